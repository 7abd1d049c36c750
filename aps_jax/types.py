"""Names that several rooms share: array aliases, the environment's step, metrics."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
PRNGKey: TypeAlias = jax.Array
Params: TypeAlias = Mapping[str, Any]


class ObservationSpec(NamedTuple):
    """What an agent sees of one environment."""

    frame_shape: tuple[int, ...]  # (H, W): grey image; (H, W, C): planes of 0 and 1
    stack: int  # frames of an observation
    frame_skip: int  # emulator frames of an agent step, 1 outside of emulators

    @property
    def is_image(self) -> bool:
        """Whether a frame is a grey image, from 0 to 255."""
        return len(self.frame_shape) == 2

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape `(H, W, C)` of an observation: stacked frames, the newest last."""
        height, width, *channels = self.frame_shape
        return (height, width, math.prod(channels) * self.stack)


class Metric(NamedTuple):
    """A measured quantity, as the documentation explains it."""

    name: str
    unit: str
    meaning: str


class TimeStep(NamedTuple):
    """What `E` environments returned at one time step, on the host or the device.

    A step that ends an episode holds the true last observation; the step after it
    holds the reset observation (`is_first`), and the pair is not a transition.
    """

    frame: Array  # [E, *frame_shape] uint8, the newest frame, never a stack.
    reward: Array  # [E] float32, unclipped game reward of reaching this frame.
    terminated: Array  # [E] bool, game over: the value of this state is 0.
    truncated: Array  # [E] bool, time limit without game over: bootstrap here.
    is_first: Array  # [E] bool, a reset frame, reached by no action.
    lives: Array  # [E] int32, lives left, 0 in games without lives.
    ram: Array  # [E, M] uint8, the console's memory: Atari has 128 bytes.
