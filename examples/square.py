"""The gradient of w squared at 3: by the rule, by JAX, and as the limit it is."""

import jax

import jaxgrad


def square(w):
    return w**2


loss, gradient = jaxgrad.value_and_grad(square)(3.0)
print(f"w = 3     loss {loss:g}, gradient {gradient:g}, by the rule 2w {2 * 3.0:g}")
assert loss == 9
assert gradient == jax.grad(square)(3.0) == 2 * 3.0

# The gradient is positive: less w means less loss.
less, more = square(2.9), square(3.1)
print(f"w = 2.9   loss {less:.2f}")
print(f"w = 3.1   loss {more:.2f}")
assert less < loss < more

table = jaxgrad.difference_table(square, 3.0)
print(f"\n{table}")
steps = [row.h for row in table.rows]
errors = [row.forward_error for row in table.rows]
best = errors.index(min(errors))
print(f"\nThe forward difference errs by {errors[0]:g} at h = {steps[0]:g},")
print(f"by {errors[best]:.1g} at h = {steps[best]:g},")
print(f"and, of rounding, by {errors[-1]:g} at h = {steps[-1]:g}.")
assert table.exact == 6
assert errors[0] == steps[0]  # (w + h)² - w² = 2wh + h², so that the error is h
assert errors[best] < errors[0]
assert errors[best] < errors[-1]
