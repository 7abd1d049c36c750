"""Every game by its name: Atari's by EnvPool, and worlds, whose names have a slash."""

from collections.abc import Sequence
from typing import Any

from aps_jax import types
from aps_jax.envs import atari, worlds


def is_world(game: str) -> bool:
    """Returns whether a game is a world, which no emulator plays."""
    return "/" in game


def check(game: str) -> None:
    """Raises a `ValueError` that names the nearest games unless there is this one."""
    (worlds.check if is_world(game) else atari.check_game)(game)


def observation_of(game: str) -> types.ObservationSpec:
    """Returns what a game shows; no emulator starts, and any Atari name will do.

    Raises:
      ValueError: There is no such world.
    """
    return worlds.observation_of(game) if is_world(game) else atari.OBSERVATION


def make_pool(
    game: str, num_envs: int, *, seeds: Sequence[int], **of_emulators: Any
) -> Any:
    """Makes a pool of environments of a game.

    Args:
      game, num_envs, seeds: As of `atari.AtariPool`.
      **of_emulators: Its other options, which worlds have no use for.

    Raises:
      ValueError: There is no such game, or an option is out of bounds.
    """
    if is_world(game):
        return worlds.WorldPool(worlds.make(game), seeds)
    return atari.AtariPool(game, num_envs, seeds=seeds, **of_emulators)
