"""The whole learning objective, written slowly: one target at a time, in float64."""

import numpy as np


def walk_target(window, start, *, n_steps, discount, task, life_cut):
    """Follows one n-step target from its start, cut where the task changes if there is.

    Returns:
      The places of the states summed, the discount before each, the place to bootstrap
      from and the discount of that value; None if the start is no transition.
    """
    num_states = len(window.is_first)
    if start + 1 < num_states and window.is_first[start + 1]:
        return None
    places, discounts, product = [], [], 1.0
    for step in range(1, n_steps + 1):
        place = start + step
        places.append(place)
        discounts.append(product)
        over = window.terminated[place] or (life_cut and window.life_lost[place])
        product *= 0.0 if over else discount
        ended = place + 1 < num_states and window.is_first[place + 1]
        switched = task is not None and np.any(task[place] != task[start])
        if over or ended or switched:
            break
    return places, discounts, places[-1], product


def entropy_reward(h, identity, particle_h, particle_ids, sigma, *, k, c, clip):
    """log(c + mean over the k nearest other particles of max(d / sigma - clip, 0))."""
    others = [
        np.linalg.norm(np.float64(h) - np.float64(particle))
        for particle, number in zip(particle_h, particle_ids, strict=True)
        if number != identity
    ]
    nearest = np.sort(others)[:k]
    return np.log(c + np.mean(np.maximum(nearest / sigma - clip, 0.0))), nearest


def whitened(h, particle_h):
    """h made white by the moments of the particles, which vary in all directions."""
    particle_h = np.float64(particle_h)
    covariance = np.atleast_2d(np.cov(particle_h.T, ddof=0))
    variances, directions = np.linalg.eigh(covariance)
    root = directions @ np.diag(variances**-0.5) @ directions.T
    return (np.float64(h) - particle_h.mean(axis=0)) @ root


def td_loss_of_target(
    form, psi_tm1, x_tm1, a, phi_sum, r_sum, discount, psi_t, x_t, w, weights
):
    """Half the squared error of one target in one of the four forms."""
    skill, entropy = weights
    psi_tm1, psi_t, w = np.float64(psi_tm1), np.float64(psi_t), np.float64(w)
    if form in ("split", "off_policy"):
        best = np.argmax(skill * psi_t @ w + entropy * np.float64(x_t))
        obeying = best if form == "split" else np.argmax(psi_t @ w)
        successor = phi_sum + discount * psi_t[obeying] - psi_tm1[a]
        exploration = r_sum + discount * x_t[best] - x_tm1[a]
        return 0.5 * (np.sum(successor**2) + exploration**2)
    if form == "vector":
        best = np.argmax(psi_t @ w)
        target = skill * phi_sum + entropy * r_sum * w + discount * psi_t[best]
        return 0.5 * np.sum((target - psi_tm1[a]) ** 2)
    reward = skill * phi_sum @ w + entropy * r_sum
    return 0.5 * (reward + discount * np.max(psi_t @ w) - psi_tm1[a] @ w) ** 2
