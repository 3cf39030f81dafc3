"""One GPT in PyTorch against three ports: plain JAX, Equinox and Flax NNX."""

import textwrap

import jax
import torch
from gpt import in_equinox, in_flax, in_jax, in_torch

import jaxgrad

torch.manual_seed(0)
module = in_torch.GPT()
state = module.state_dict()
shape = (4, in_torch.CONTEXT + 1)
tokens = jax.random.randint(jax.random.key(0), shape, 0, in_torch.VOCABULARY)

ports = {"plain JAX": in_jax, "Equinox": in_equinox, "Flax NNX": in_flax}
reports = {
    name: jaxgrad.compare_with_torch(
        port.loss, port.load(state), tokens, module=module, torch_loss=in_torch.loss
    )
    for name, port in ports.items()
}

# Each port keeps PyTorch's fused weight of q, k and v in its own way. The comparison
# isn't told: it finds the numbers.
FUSED = "h.1.attn.c_attn.weight"
print(f"Where {FUSED} is\n")
for name, report in reports.items():
    for row in report.parameters:
        if row.torch_name == FUSED:
            layout = textwrap.shorten(row.layout, 30, placeholder=" ...")
            print(f"{name:12}{row.path:31}{layout}")

print("\nport        agrees   digits          loss   in PyTorch")
for name, report in reports.items():
    agrees, loss = "yes" if report else "no", report.loss
    print(f"{name:12}{agrees:9}{report.digits:6.1f}{loss.jax:14.6f}{loss.torch:13.6f}")
    assert report
