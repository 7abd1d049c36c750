"""A test of learning: each kind of head finds the values of a chain of five states."""

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import base, value
from aps_jax.replay import buffer

NUM_STATES, NUM_ACTIONS, DISCOUNT = 5, 3, 0.8
OBSERVATION = types.ObservationSpec((3, 7, 1), 1, 1)
# The largest errors are then 0.005, 0.001 and 0.006.
NUM_UPDATES = 600
# Noisy and dueling distributions, a dueling scalar, a plain distribution.
HEADS = {
    "der": {},
    "drq": {"shift_pad": 0, "intensity_scale": 0.0, "learning_rate": 3e-3},
    "der_dopamine": {"dueling": "none", "noisy_sigma": 0.0},
}


def step(state, action):
    """Stays, goes right or left; the right end pays 1, and leads back to the start."""
    if state == NUM_STATES - 1:
        return 0, 0.0
    reached = int(np.clip(state + (0, 1, -1)[action], 0, NUM_STATES - 1))
    return reached, float(reached == NUM_STATES - 1)


def optimal_values():
    """Value iteration, `[5, 3]`."""
    q = np.zeros((NUM_STATES, NUM_ACTIONS))
    for _ in range(200):
        old = q.copy()
        for state, action in np.ndindex(q.shape):
            reached, reward = step(state, action)
            q[state, action] = reward + DISCOUNT * old[reached].max()
    return q


def plane(state):
    """A plane with a 1 at the place of the state."""
    frame = np.zeros(OBSERVATION.shape, np.uint8)
    frame[1, 1 + state] = 1
    return frame


def transitions():
    """Windows of two states: every action in every state once."""
    pairs = list(np.ndindex(NUM_STATES, NUM_ACTIONS))
    reached = [step(*pair) for pair in pairs]
    shape = (len(pairs), 2)
    return buffer.Window(
        observation=np.stack(
            [
                np.stack([plane(state), plane(after)])
                for (state, _), (after, _) in zip(pairs, reached, strict=True)
            ]
        ),
        action=np.int32([[action, 0] for _, action in pairs]),
        reward=np.float32([[0.0, reward] for _, reward in reached]),
        terminated=np.zeros(shape, bool),
        is_first=np.zeros(shape, bool),
        life_lost=np.zeros(shape, bool),
        id=np.zeros(shape, np.int32),
        extras={},
    )


def learned_values(name):
    config = config_lib.replace_options(
        config_lib.preset_config("smoke", name),
        **{
            "game": fakes.PLANES,
            "encoder": "minatar",
            "n_steps": 1,
            "discount": DISCOUNT,
            "batch_size": NUM_STATES * NUM_ACTIONS,
            "hidden_units": 64,
            "value_min": 0.0,
            "value_max": 3.0,
            "learning_rate": 2e-3,
            "target_period": 10,
            **HEADS[name],
        },
    ).learner
    agent = value.make(config, NUM_ACTIONS, OBSERVATION)
    state = jax.jit(agent.init)(jax.random.key(0))
    update = jax.jit(agent.finetune.learner.update, donate_argnums=0)
    batch = jax.device_put(base.Batch(transitions(), None))
    for key in jax.random.split(jax.random.key(1), NUM_UPDATES):
        state = update(state, batch, key).state
    network = value.make_network(config, NUM_ACTIONS, OBSERVATION)
    states = np.stack([plane(state) for state in range(NUM_STATES)])
    logits = network.apply(state.params["values"], states, {})
    return value.mean_values(value.make_atoms(config), logits)


@pytest.mark.parametrize("name", HEADS)
def test_each_kind_of_head_learns_what_value_iteration_finds(name):
    np.testing.assert_allclose(learned_values(name), optimal_values(), atol=0.05)
