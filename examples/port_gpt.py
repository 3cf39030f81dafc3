"""One GPT in PyTorch, against three ports: plain JAX, Equinox and Flax NNX."""

import jax
from gpt import in_equinox, in_flax, in_jax, in_torch

import jaxgrad

shape = (4, in_torch.CONTEXT + 1)
tokens = jax.random.randint(jax.random.key(0), shape, 0, in_torch.VOCABULARY)

reports = {}
for name, port in [
    ("plain JAX", in_jax), ("Equinox", in_equinox), ("Flax NNX", in_flax)
]:
    reports[name] = jaxgrad.compare_with_torch(
        port.loss,
        port.load(),
        tokens,
        module=in_torch.module,
        torch_loss=in_torch.loss,
    )
    print(reports[name])
