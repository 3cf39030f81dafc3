"""Correct losses of linear algebra: factorings, solvers, norms."""

import jax
import jax.numpy as jnp
import torch
from jax import lax

from corpus.case import Case, Problem, case, draw

CASES: list[Case] = []


def positive(x, floor=1.0):
    """A positive definite matrix."""
    return x @ x.T + floor * jnp.eye(len(x), dtype=x.dtype)


def torch_cholesky(x, b):
    factor = torch.linalg.cholesky(x @ x.T + torch.eye(4).double())
    return torch.cholesky_solve(b[:, None], factor).square().sum() + factor.sum()


@case(CASES, twin=torch_cholesky)
def cholesky(plant):
    @plant
    def factored(matrix):
        return jnp.linalg.cholesky(matrix)

    def loss(x, b):
        factor = factored(positive(x))
        solution = jax.scipy.linalg.cho_solve((factor, True), b)
        return jnp.sum(solution**2) + jnp.sum(factor)

    return Problem(loss, draw(0, 4, 4), (draw(1, 4),))


def torch_solve(a, b):
    return torch.sin(torch.linalg.solve(a, b)).sum()


@case(CASES, twin=torch_solve)
def solve(plant):
    @plant
    def solution(a, b):
        return jnp.linalg.solve(a, b)

    def loss(params):
        return jnp.sum(jnp.sin(solution(*params)))

    return Problem(loss, (draw(2, 5, 5) + 3 * jnp.eye(5), draw(3, 5, 2)))


@case(CASES)
def triangular_solve(plant):
    @plant
    def solution(lower, b):
        return jax.scipy.linalg.solve_triangular(lower, b, lower=True)

    def loss(params):
        lower = jnp.tril(params["lower"], -1) + jnp.diag(jnp.exp(params["log_diag"]))
        return jnp.sum(jnp.cos(solution(lower, params["b"])))

    params = {
        "lower": draw(4, 5, 5, scale=0.5),
        "log_diag": draw(5, 5, scale=0.2),
        "b": draw(6, 5),
    }
    return Problem(loss, params)


def torch_eigenvalues(x, weights):
    return torch.exp(torch.linalg.eigvalsh((x + x.T) / 2)) @ weights


@case(CASES, twin=torch_eigenvalues)
def eigenvalues(plant):
    @plant
    def spectrum(matrix):
        return jnp.linalg.eigvalsh(matrix)

    def loss(x, weights):
        return jnp.exp(spectrum((x + x.T) / 2)) @ weights

    return Problem(loss, draw(7, 5, 5), (draw(8, 5),))


@case(CASES)
def eigenvectors_projector(plant):
    @plant
    def top_two(matrix):
        _, vectors = jnp.linalg.eigh(matrix)
        return vectors[:, -2:] @ vectors[:, -2:].T

    def loss(x, target):
        return jnp.sum((top_two(x @ x.T) - target) ** 2)

    return Problem(loss, draw(9, 5, 5), (draw(10, 5, 5),))


def torch_nuclear(x, y):
    return torch.linalg.matrix_norm(x, "nuc") + (x - y).square().sum()


@case(CASES, twin=torch_nuclear)
def svd_nuclear_norm(plant):
    @plant
    def singular_values(x):
        return jnp.linalg.svd(x, compute_uv=False)

    def loss(x, y):
        return jnp.sum(singular_values(x)) + jnp.sum((x - y) ** 2)

    return Problem(loss, draw(11, 4, 6), (draw(12, 4, 6),))


@case(CASES)
def svd_low_rank(plant):
    @plant
    def truncated(x):
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
        return (u[:, :2] * s[:2]) @ vt[:2]

    def loss(x, y):
        return jnp.sum((truncated(x) - y) ** 2)

    return Problem(loss, draw(13, 5, 4), (draw(14, 5, 4),))


def torch_qr(x, y):
    q, r = torch.linalg.qr(x)
    return (q @ (q.T @ y)).square().sum() + r.diagonal().abs().log().sum()


@case(CASES, twin=torch_qr)
def qr_projection(plant):
    @plant
    def factored(x):
        return jnp.linalg.qr(x)

    def loss(x, y):
        q, r = factored(x)
        return jnp.sum((q @ (q.T @ y)) ** 2) + jnp.sum(jnp.log(jnp.abs(jnp.diag(r))))

    return Problem(loss, draw(15, 6, 3), (draw(16, 6),))


def torch_determinants(x):
    return torch.linalg.slogdet(x)[1] + torch.sin(torch.linalg.det(x))


@case(CASES, twin=torch_determinants)
def determinants(plant):
    @plant
    def log_determinant(x):
        return jnp.linalg.slogdet(x)[1]

    def loss(x):
        return log_determinant(x) + jnp.sin(jnp.linalg.det(x))

    return Problem(loss, draw(17, 4, 4))


def torch_inverse(x):
    return torch.tanh(torch.linalg.inv(x)).sum()


@case(CASES, twin=torch_inverse)
def inverse(plant):
    @plant
    def inverted(x):
        return jnp.linalg.inv(x)

    def loss(x):
        return jnp.sum(jnp.tanh(inverted(x)))

    return Problem(loss, draw(18, 4, 4) + 3 * jnp.eye(4))


def torch_exponential(x, start):
    return torch.sin(torch.linalg.matrix_exp(x) @ start).sum()


@case(CASES, twin=torch_exponential)
def matrix_exponential(plant):
    @plant
    def flow(x, start):
        return jax.scipy.linalg.expm(x) @ start

    def loss(x, start):
        return jnp.sum(jnp.sin(flow(x, start)))

    return Problem(loss, draw(19, 4, 4, scale=0.5), (draw(20, 4),))


@case(CASES)
def pseudo_inverse_and_power(plant):
    @plant
    def least_squares(x, y):
        return jnp.linalg.pinv(x) @ y

    def loss(params, y):
        cubed = jnp.linalg.matrix_power(params["square"], 3)
        return jnp.sum((cubed @ least_squares(params["tall"], y)) ** 2)

    params = {"tall": draw(21, 6, 3), "square": draw(22, 3, 3, scale=0.5)}
    return Problem(loss, params, (draw(23, 6),))


def torch_norms(x):
    rows = torch.linalg.vector_norm(x, dim=1).sum()
    return torch.linalg.matrix_norm(x) + x.abs().sum() + rows + x.abs().max()


@case(CASES, twin=torch_norms)
def norms(plant):
    @plant
    def row_norms(x):
        return jnp.linalg.norm(x, axis=1)

    def loss(x):
        flat = x.ravel()
        one, largest = jnp.linalg.norm(flat, 1), jnp.linalg.norm(flat, jnp.inf)
        return jnp.linalg.norm(x) + one + jnp.sum(row_norms(x)) + largest

    return Problem(loss, draw(24, 4, 3))


@case(CASES)
def ridge_regression_bilevel(plant):
    """The penalty is tuned on held-out data, through the inner solution."""

    @plant
    def fit(log_penalty, x, y):
        gram = x.T @ x + jnp.diag(jnp.exp(log_penalty))
        return jax.scipy.linalg.solve(gram, x.T @ y, assume_a="pos")

    def loss(log_penalty, x, y, x_new, y_new):
        return jnp.mean((x_new @ fit(log_penalty, x, y) - y_new) ** 2)

    args = (draw(26, 9, 4), draw(27, 9), draw(28, 9, 4), draw(29, 9))
    return Problem(loss, draw(30, 4), args)


@case(CASES)
def conjugate_gradients(plant):
    @plant
    def right_side(b, scale):
        return jnp.tanh(b) * scale

    def loss(params):
        matrix = positive(params["x"])
        b = right_side(params["b"], params["scale"])
        solution, _ = jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, b, tol=1e-10)
        return jnp.sum(solution**2)

    names = {"x": (4, 4), "b": (4,), "scale": (4,)}
    params = {
        name: draw(31 + i, *shape) for i, (name, shape) in enumerate(names.items())
    }
    return Problem(loss, params)


@case(CASES)
def custom_linear_solve(plant):
    @plant
    def squared(x):
        return jnp.sum(x**2)

    def loss(params):
        matrix = jnp.diag(3 + jnp.tanh(params["diag"])) + 0.2 * params["full"]

        def by_jacobi(matvec, b):
            def improve(_, x):
                return x + (b - matvec(x)) / 3

            return lax.fori_loop(0, 120, improve, jnp.zeros_like(b))

        solution = lax.custom_linear_solve(
            lambda v: matrix @ v, params["b"], by_jacobi, by_jacobi
        )
        return squared(solution)

    params = {
        "diag": draw(34, 4),
        "full": draw(35, 4, 4, scale=0.5),
        "b": draw(36, 4),
    }
    return Problem(loss, params)


@case(CASES)
def power_iteration(plant):
    @plant
    def apply(matrix, v):
        return matrix @ v

    def loss(x, start):
        matrix = positive(x)

        def step(_, v):
            v = apply(matrix, v)
            return v / jnp.linalg.norm(v)

        v = lax.fori_loop(0, 12, step, start)
        return v @ matrix @ v

    return Problem(loss, draw(42, 4, 4), (draw(43, 4),))


def torch_einsum(a, b, c):
    batch = torch.bmm(a, b)
    return torch.einsum("bij,bjk,ik->b", batch, b, c).sin().sum()


@case(CASES, twin=torch_einsum)
def einsum_batched_matmul(plant):
    @plant
    def product(a, b):
        return a @ b

    def loss(params):
        a, b, c = params
        return jnp.sum(jnp.sin(jnp.einsum("bij,bjk,ik->b", product(a, b), b, c)))

    params = (draw(46, 3, 4, 4), draw(47, 3, 4, 4, scale=0.5), draw(48, 4, 4))
    return Problem(loss, params)


@case(CASES)
def kronecker_and_outer(plant):
    @plant
    def structured(a, b):
        return jnp.kron(a, b)

    def loss(params, x):
        full = structured(params["a"], params["b"]) + jnp.outer(
            params["u"], params["u"]
        )
        return jnp.log(1 + jnp.sum((full @ x) ** 2))

    params = {"a": draw(49, 2, 2), "b": draw(50, 3, 3), "u": draw(51, 6)}
    return Problem(loss, params, (draw(52, 6),))
