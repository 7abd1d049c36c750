"""Names that several modules share: array aliases, a metric, an environment's step."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
PRNGKey: TypeAlias = jax.Array
Params: TypeAlias = Mapping[str, Any]


class TimeStep(NamedTuple):
    """What `E` environments returned at one time step, on the host or the device.

    A step that ends an episode holds the true last observation; the step after it
    holds the reset observation (`is_first`), and the pair is not a transition.
    """

    frame: Array  # [E, 84, 84] uint8, the newest grey frame, never a stack.
    reward: Array  # [E] float32, unclipped game reward of reaching this frame.
    terminated: Array  # [E] bool, game over: the value of this state is 0.
    truncated: Array  # [E] bool, time limit without game over: bootstrap here.
    is_first: Array  # [E] bool, a reset frame, reached by no action.
    lives: Array  # [E] int32, lives left, 0 in games without lives.
    ram: Array  # [E, 128] uint8, the console's memory.


class Metric(NamedTuple):
    """A measured quantity, as the documentation explains it."""

    name: str
    unit: str
    meaning: str
