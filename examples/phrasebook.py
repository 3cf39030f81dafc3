"""A PyTorch user's phrasebook: each line and its JAX form, run side by side."""

import numpy as np

# Each phrase: what it says, in PyTorch, in JAX. The last line of each is its result.
PHRASES = [
    (
        "a linear layer, with the weights of the lesson",
        """
import torch
layer = torch.nn.Linear(3, 1)
layer.load_state_dict({"weight": torch.tensor([[0.5, 0.4, 0.3]]),
                       "bias": torch.tensor([0.3])})
layer.weight.shape
""",
        """
import jax, jax.numpy as jnp, jaxgrad
params = jaxgrad.LinearParams(weight=jnp.array([[0.5, 0.4, 0.3]]),
                              bias=jnp.array([0.3]))
params.weight.shape
""",
    ),
    (
        "data",
        """
x, y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0]])
x
""",
        """
x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])
x
""",
    ),
    ("predict", "layer(x)", "jaxgrad.linear(params, x)"),
    (
        "the loss: a value there, a function of the parameters here",
        """
loss = ((layer(x) - y) ** 2).mean()
loss.item()
""",
        """
def loss(params, x, y):
    return jnp.mean((jaxgrad.linear(params, x) - y) ** 2)
loss(params, x, y).item()
""",
    ),
    (
        "compute the gradients",
        """
loss.backward()
layer.weight.grad
""",
        """
grads = jax.grad(loss)(params, x, y)
grads.weight
""",
    ),
    (
        "the loss and its gradients at once, as a function of the parameters",
        """
def objective(p):
    prediction = torch.func.functional_call(layer, p, (x,))
    return ((prediction - y) ** 2).mean()
parameters = dict(layer.named_parameters())
grads, value = torch.func.grad_and_value(objective)(parameters)
value
""",
        """
value, grads = jaxgrad.value_and_grad(loss)(params, x, y)
value
""",
    ),
    ("read one parameter's gradient", "layer.bias.grad", "grads.bias"),
    (
        "add up the gradients of two passes: by default there, on purpose here",
        """
((layer(x) - y) ** 2).mean().backward()
layer.weight.grad
""",
        """
total = jax.tree.map(jnp.add, grads, jax.grad(loss)(params, x, y))
total.weight
""",
    ),
    (
        "set a gradient to zero in place: here, make zeros",
        """
layer.weight.grad.zero_()
layer.weight.grad
""",
        """
zeros = jax.tree.map(jnp.zeros_like, grads)
zeros.weight
""",
    ),
    (
        "start afresh: needed there, since grad is a store; nothing to do here",
        """
optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
optimizer.zero_grad()
((layer(x) - y) ** 2).mean().backward()
layer.weight.grad
""",
        """
grads = jax.grad(loss)(params, x, y)
grads.weight
""",
    ),
    (
        "update by hand: in place there, new parameters here",
        """
copy = [p.detach().clone() for p in layer.parameters()]
for p, original in zip(copy, layer.parameters()):
    p -= 0.01 * original.grad
copy[0]
""",
        """
by_hand = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
by_hand.weight
""",
    ),
    (
        "update by an optimizer",
        """
optimizer.step()
layer.weight.detach()
""",
        """
import optax
optimizer = optax.sgd(0.01)
updates, _ = optimizer.update(grads, optimizer.init(params))
params = optax.apply_updates(params, updates)
params.weight
""",
    ),
    (
        "the loss after it, without recording for a gradient",
        """
with torch.no_grad():
    after = ((layer(x) - y) ** 2).mean()
after.item()
""",
        "loss(params, x, y).item()",
    ),
    (
        "a training loop",
        """
for _ in range(10):
    optimizer.zero_grad()
    ((layer(x) - y) ** 2).mean().backward()
    optimizer.step()
layer.weight.detach()
""",
        """
result = jaxgrad.train(loss, params, x, y,
                       steps=10, learning_rate=0.01)
result.params.weight
""",
    ),
]


def say(code, names):
    """Runs the lines of a phrase and returns the value of its last."""
    *lines, last = code.strip().split("\n")
    exec("\n".join(lines), names)
    value = eval(last, names)
    return np.asarray(value.detach() if hasattr(value, "detach") else value)


def show(language, code, value):
    *lines, last = code.strip().split("\n")
    for line in lines:
        print(f"  {language} | {line}")
    print(f"  {language} | {last}")
    print(f"  {' ' * len(language)} = {value}")


in_torch, in_jax = {}, {}
for meaning, torch_code, jax_code in PHRASES:
    theirs, ours = say(torch_code, in_torch), say(jax_code, in_jax)
    print(f"\n{meaning}")
    show("PyTorch", torch_code, theirs)
    show("    JAX", jax_code, ours)
    assert theirs.shape == ours.shape, meaning
    # Rounding may differ once in each update, and there are eleven.
    np.testing.assert_allclose(ours, theirs, rtol=11 * np.finfo(np.float32).eps)
print(f"\nAll {len(PHRASES)} phrases agree.")
