"""Slow float64 versions of `aps_jax.ops.losses`, one loop per sum."""

import numpy as np


def dot(x, y):
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def scalar_td_error(psi_tm1, a_tm1, r_t, discount_t, psi_t, w):
    best = max(dot(row, w) for row in psi_t)
    return float(r_t) + float(discount_t) * best - dot(psi_tm1[a_tm1], w)


def vector_td_error(psi_tm1, a_tm1, cumulant_t, discount_t, psi_t, w):
    a_t = int(np.argmax([dot(row, w) for row in psi_t]))
    target = np.float64(cumulant_t) + float(discount_t) * np.float64(psi_t[a_t])
    return target - np.float64(psi_tm1[a_tm1])


def split_td_error(
    psi_tm1,
    exploration_tm1,
    a_tm1,
    phi_t,
    r_entropy_t,
    discount_t,
    psi_t,
    exploration_t,
    w,
    *,
    skill_weight,
    entropy_weight,
):
    values = [
        skill_weight * dot(row, w) + entropy_weight * float(value)
        for row, value in zip(psi_t, exploration_t, strict=True)
    ]
    a_t = int(np.argmax(values))
    discount_t = float(discount_t)
    successor = np.float64(phi_t) + discount_t * np.float64(psi_t[a_t])
    exploration = float(r_entropy_t) + discount_t * float(exploration_t[a_t])
    return (
        successor - np.float64(psi_tm1[a_tm1]),
        exploration - float(exploration_tm1[a_tm1]),
    )


def off_policy_td_error(
    psi_tm1,
    exploration_tm1,
    a_tm1,
    phi_t,
    r_entropy_t,
    discount_t,
    psi_t,
    exploration_t,
    w,
    *,
    skill_weight,
    entropy_weight,
):
    successor = vector_td_error(psi_tm1, a_tm1, phi_t, discount_t, psi_t, w)
    values = [
        skill_weight * dot(row, w) + entropy_weight * float(value)
        for row, value in zip(psi_t, exploration_t, strict=True)
    ]
    following = float(discount_t) * float(exploration_t[int(np.argmax(values))])
    return successor, float(r_entropy_t) + following - float(exploration_tm1[a_tm1])


def n_step_target(r_t, discount_t, v_t):
    target = float(v_t[-1])
    for r, discount in zip(reversed(r_t), reversed(discount_t), strict=True):
        target = float(r) + float(discount) * target
    return target


def n_step_cumulant(cumulant_t, discount_t):
    total, product = np.zeros_like(np.float64(cumulant_t[0])), 1.0
    for cumulant, discount in zip(cumulant_t, discount_t, strict=True):
        total = total + product * np.float64(cumulant)
        product *= float(discount)
    return total, product
