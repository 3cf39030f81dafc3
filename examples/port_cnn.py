"""A CNN: PyTorch has channels first, JAX last, and the flattened order is another."""

import jax
import jax.numpy as jnp
import optax
import torch
from jax import lax

import jaxgrad


class TorchCNN(torch.nn.Module):
    """Two convolutions, and a linear layer on the flattened (channel, row, column)."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = torch.nn.Linear(16 * 4 * 4, 10)

    def forward(self, x):
        """The scores of images (batch, 3, 16, 16)."""
        x = torch.relu(self.conv1(x))
        x = torch.nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.conv2(x))
        return self.head(x.flatten(1))


# The images come with channels last, as JAX has them.
def torch_loss(module, x, label):
    return torch.nn.functional.cross_entropy(module(x.permute(0, 3, 1, 2)), label)


# A kernel is (row, column, in, out).
def conv(layer, x, stride=1):
    dims = ("NHWC", "HWIO", "NHWC")
    # Both sides, as PyTorch: "SAME" would pad a stride of 2 on the right alone.
    padding = [(1, 1), (1, 1)]
    y = lax.conv_general_dilated(
        x, layer["kernel"], (stride, stride), padding, dimension_numbers=dims
    )
    return y + layer["bias"]


def loss(params, x, label):
    x = jax.nn.relu(conv(params["conv1"], x))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(conv(params["conv2"], x, stride=2))
    x = x.reshape(len(x), -1)  # (row, column, channel)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


# Hence the rows of the head's kernel are PyTorch's columns in another order. No shape
# tells that, so it's said. The convolutions' kernels are laid out by their shapes.
def head_kernel(weight):
    return weight.reshape(10, 16, 4, 4).transpose(2, 3, 1, 0).reshape(-1, 10)


like = {
    "conv1": {"kernel": jnp.zeros((3, 3, 3, 8)), "bias": jnp.zeros(8)},
    "conv2": {"kernel": jnp.zeros((3, 3, 8, 16)), "bias": jnp.zeros(16)},
    "head": {"kernel": jnp.zeros((4 * 4 * 16, 10)), "bias": jnp.zeros(10)},
}
torch.manual_seed(0)
module = TorchCNN()
x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
label = jnp.array([3, 1, 4, 1])


def compare(mapping=None):
    state = module.state_dict()
    params = jaxgrad.load_torch_parameters(state, like, mapping=mapping).params
    return jaxgrad.compare_with_torch(
        loss, params, x, label, module=module, torch_loss=torch_loss
    )


report = compare({"head.kernel": ("head.weight", head_kernel)})
print(f"The head's rows reordered\n\n{report}\n")
assert report

# And if that is forgotten:
report = compare()
print(f"The head only transposed\n\n{report}")
assert report.first_difference.module == "head"
assert report.causes[0].kind == "permuted"
