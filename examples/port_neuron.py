"""The lesson's neuron in PyTorch and in JAX: the same gradients, the same ten steps."""

import jax
import jax.numpy as jnp
import torch

import jaxgrad

# The neuron there: three weights and a bias.
module = torch.nn.Linear(3, 1)
with torch.no_grad():
    module.weight.copy_(torch.tensor([[0.5, 0.4, 0.3]]))
    module.bias.fill_(0.3)


def torch_loss(module, x, y):
    return torch.nn.functional.mse_loss(module(x), y)


# The neuron here, with the numbers from there.
like = jaxgrad.init_linear(jax.random.key(0), 3, 1)
params = jaxgrad.load_torch_parameters(module.state_dict(), like).params

x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
report = jaxgrad.compare_with_torch(
    jaxgrad.linear_loss,
    params,
    x,
    y,
    module=module,
    torch_loss=torch_loss,
    steps=10,  # of gradient descent, by this library, by optax and by PyTorch
)
print(report)
assert report  # true if the loss, the gradients and the steps agree
assert report.loss == (6.25, 6.25)
assert report.trajectory.steps == 10
