"""Slow float64 versions of `aps_jax.ops.sphere`, and the distributions it follows."""

import numpy as np
import scipy.integrate
import scipy.special
import scipy.stats


def normalize(vectors):
    """Divides one vector at a time by its norm; zero stays zero."""
    vectors = np.float64(vectors)
    rows = vectors.reshape(-1, vectors.shape[-1])
    units = [row / np.linalg.norm(row) if row.any() else row for row in rows]
    return np.stack(units).reshape(vectors.shape)


def angle_cdf(dim, kappa):
    """Integrates SciPy's von Mises-Fisher density over caps around the mean direction.

    Returns the cumulative distribution of the angle to the mean, of `dim >= 2`.
    """
    # At most 40 standard deviations of the angle, which concentrates like kappa^-1/2.
    largest = min(np.pi, 40 * np.sqrt(dim / max(kappa, 1e-9)))
    angles = np.linspace(0.0, largest, 20_001)
    points = np.zeros((angles.size, dim))
    points[:, 0], points[:, 1] = np.cos(angles), np.sin(angles)
    if kappa > 0:
        mean = np.eye(dim)[0]
        density = scipy.stats.vonmises_fisher(mean, kappa).pdf(points)
    else:
        area = 2 * np.pi ** (dim / 2) / scipy.special.gamma(dim / 2)
        density = np.full(angles.size, 1 / area)
    ring = 2 * np.pi ** ((dim - 1) / 2) / scipy.special.gamma((dim - 1) / 2)
    density = density * ring * np.sin(angles) ** (dim - 2)
    cumulative = scipy.integrate.cumulative_simpson(density, x=angles, initial=0.0)
    np.testing.assert_allclose(cumulative[-1], 1.0, rtol=1e-4)
    return lambda angle: np.interp(angle, angles, cumulative)


def mean_cosine(dim, kappa):
    """Computes `I_{D/2}(kappa) / I_{D/2-1}(kappa)`, the mean cosine to the mean."""
    if kappa == 0:
        return 0.0
    return scipy.special.ive(dim / 2, kappa) / scipy.special.ive(dim / 2 - 1, kappa)
