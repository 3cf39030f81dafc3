"""The lesson's neuron: its prediction, its loss, its gradients and where they lead."""

import jax.numpy as jnp
import numpy as np

import jaxgrad

params = jaxgrad.LinearParams(
    weight=jnp.array([[0.5, 0.4, 0.3]]), bias=jnp.array([0.3])
)
x, y = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[5.0]])

prediction = jaxgrad.linear(params, x)
loss, gradient = jaxgrad.value_and_grad(jaxgrad.linear_loss)(params, x, y)
print(f"prediction         {prediction.item():g}, for a target of {y.item():g}")
print(f"loss               {loss:g}")
print(f"weight's gradient  {gradient.weight.tolist()}")
print(f"bias's gradient    {gradient.bias.tolist()}")
assert prediction == 2.5
assert loss == 6.25
np.testing.assert_array_equal(gradient.weight, [[-5, -10, -15]])
np.testing.assert_array_equal(gradient.bias, [-5])

# Each is the error signal, 2 (prediction - target), times its own input. The bias's
# input is 1.
signal = 2 * (prediction - y)
print(f"error signal       {signal.item():g}, times the inputs {x[0].tolist()} and 1")
np.testing.assert_array_equal(gradient.weight, signal * x)
np.testing.assert_array_equal(gradient.bias, signal[0])


def six_digits(array):
    return np.asarray(array, np.float64).round(6).tolist()


# All are negative: more of each parameter means less loss. One step goes there.
after, _ = jaxgrad.sgd_update(
    params, grads=gradient, state=jaxgrad.init_sgd(params), learning_rate=0.01
)
new_loss = jaxgrad.linear_loss(after, x, y)
print(f"after one step     weight {six_digits(after.weight)}")
print(f"                   bias {six_digits(after.bias)}")
print(f"                   loss {new_loss:g}, improved by {loss - new_loss:g}")
# The step moves the prediction by 0.01 * 5 * (1² + 2² + 3² + 1²) = 0.75.
np.testing.assert_allclose(jaxgrad.linear(after, x), 2.5 + 0.75, rtol=1e-6)
np.testing.assert_allclose(new_loss, (3.25 - 5) ** 2, rtol=1e-6)
