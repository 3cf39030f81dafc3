"""Non-finite values from linear algebra: equal eigenvalues and singular matrices."""

import jax.numpy as jnp
from corpus.case import draw
from jax.scipy.linalg import cho_factor, cho_solve

from faults.case import Nonfinite, Problem, nonfinite

CASES: list[Nonfinite] = []


@nonfinite(CASES, "equal eigenvalues", phase="backward")
def eigenvectors_of_equal_eigenvalues():
    def loss(a, x):
        _, vectors = jnp.linalg.eigh(a)  # blame
        return jnp.sum((x @ vectors) ** 3)

    return Problem(loss, jnp.diag(jnp.array([2.0, 2.0, 5.0])), (draw(0, 4, 3),))


@nonfinite(CASES, "equal eigenvalues", phase="backward")
def whitening_of_white_data():
    def loss(scale, x):
        data = x * scale
        covariance = data.T @ data
        values, vectors = jnp.linalg.eigh(covariance)  # blame
        white = data @ vectors / jnp.sqrt(values)
        return jnp.sum(white**4)

    return Problem(loss, jnp.ones(2), (jnp.array([[1.0, 0.0], [0.0, 1.0]]),))


@nonfinite(CASES, "equal eigenvalues", phase="backward")
def svd_of_equal_singular_values():
    def loss(w):
        u, s, vt = jnp.linalg.svd(w)  # blame
        return jnp.sum(u[:, 0]) + s[0] + jnp.sum(vt[0])

    return Problem(loss, 3 * jnp.eye(2))


@nonfinite(CASES, "domain", "singular matrix", phase="forward")
def cholesky_of_an_indefinite_matrix():
    def loss(covariance, y):
        factor = jnp.linalg.cholesky(covariance)  # blame
        return jnp.sum(jnp.log(jnp.diag(factor))) + jnp.sum(factor @ y)

    return Problem(loss, jnp.array([[1.0, 2.0], [2.0, 1.0]]), (draw(1, 2),))


@nonfinite(CASES, "domain", "singular matrix", phase="forward")
def gaussian_process_with_negative_noise():
    def loss(params, x, y):
        gaps = (x[:, None] - x[None]) ** 2
        kernel = jnp.exp(-gaps / jnp.exp(params["log_scale"]))
        noisy = kernel + params["noise"] * jnp.eye(3)
        factor = cho_factor(noisy, lower=True)  # blame
        return y @ cho_solve(factor, y)

    params = {"log_scale": jnp.float32(0.0), "noise": jnp.float32(-0.1)}
    return Problem(loss, params, (jnp.array([0.0, 1.0, 1.0]), draw(2, 3)))


@nonfinite(CASES, "singular matrix", phase="forward")
def solve_with_a_singular_matrix():
    def loss(params, y):
        x = jnp.linalg.solve(params["a"], y)  # blame
        return jnp.sum(x**2) + params["bias"]

    params = {"a": jnp.array([[1.0, 2.0], [2.0, 4.0]]), "bias": jnp.float32(1.0)}
    return Problem(loss, params, (jnp.array([1.0, 3.0]),))


@nonfinite(CASES, "singular matrix", phase="forward")
def inverse_of_a_singular_matrix():
    def loss(w, x):
        gram = w.T @ w
        inverse = jnp.linalg.inv(gram)  # blame
        return jnp.trace(inverse @ x)

    return Problem(loss, jnp.array([[1.0, 1.0], [1.0, 1.0]]), (draw(3, 2, 2),))


@nonfinite(CASES, "singular matrix", "log of zero")
def log_determinant_of_a_singular_matrix():
    def loss(w):
        _, log_determinant = jnp.linalg.slogdet(w)  # blame
        return log_determinant

    return Problem(loss, jnp.array([[1.0, 2.0], [2.0, 4.0]]))
