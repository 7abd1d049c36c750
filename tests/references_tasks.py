"""Slow float64 versions of `aps_jax.ops.tasks`."""

import numpy as np


def least_squares(phi, r, intercept):
    """Solves for `w` and the constant reward by NumPy's `lstsq`."""
    phi, r = np.float64(phi), np.float64(r)
    if intercept:
        phi = np.column_stack([phi, np.ones(len(phi))])
    w = np.linalg.lstsq(phi, r, rcond=None)[0]
    return (w[:-1], w[-1]) if intercept else (w, 0.0)


def ridge(phi, r, ridge, intercept):
    """Solves the regularised normal equations, of deviations with an intercept."""
    phi, r = np.float64(phi), np.float64(r)
    if intercept:
        phi, r = phi - np.mean(phi, axis=0), r - np.mean(r)
    return np.linalg.solve(phi.T @ phi + ridge * np.eye(phi.shape[1]), phi.T @ r)


def r_squared(phi, r, w, b, intercept):
    """One minus the share of the squared rewards that `phi^T w + b` leaves."""
    phi, r = np.float64(phi), np.float64(r)
    total = r - np.mean(r) if intercept else r
    return 1 - np.sum((r - phi @ np.float64(w) - b) ** 2) / np.sum(total**2)


def cosine(x, y):
    x, y = np.float64(x), np.float64(y)
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


def gpi_action_values(psi, w):
    """Takes the best policy of every action, one product at a time."""
    num_policies, num_actions, _ = psi.shape
    return [
        max(np.float64(psi[i, a]) @ np.float64(w) for i in range(num_policies))
        for a in range(num_actions)
    ]
