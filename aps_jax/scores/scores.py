"""Random, human and published Atari scores, and the human-normalised score.

The tables are `aps_jax/scores/data/*.csv`; the README there says where they come from.
Games may be spelled as in EnvPool (`UpNDown`) or as in the tables (`up_n_down`); the
functions return the tables' spelling.
"""

import csv
import difflib
import functools
import importlib.resources
import types
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

_Score = TypeVar("_Score", float, np.ndarray)


class ReferenceScores(NamedTuple):
    """Mean returns in points that define 0 and 1 of the human-normalised score."""

    random: float  # An agent that draws its actions uniformly.
    human: float  # A professional game tester.


class PublishedCell(NamedTuple):
    """One published score of one system in one game."""

    score: float  # Mean return in points, as printed.
    suspect: str  # Why the score cannot be right; empty where it can.
    source: str  # The paper or repository that it was taken from.
    deviation: float  # Standard deviation over seeds; NaN where it is not known.


def find_reference_scores(game: str) -> ReferenceScores | None:
    """Returns the random and human scores of a game, or None where there are none."""
    name = _names_by_key().get(_key(game))
    return None if name is None else _references()[name]


def reference_scores(game: str) -> ReferenceScores:
    """Returns the random and human scores of a game.

    Raises:
      ValueError: The table has no such game; the message names the nearest ones.
    """
    return _references()[canonical_game(game)]


def human_normalized_score(game: str, score: _Score) -> _Score:
    """Computes (score - random) / (human - random): 0 is random play, 1 is human.

    The normalisation of DQN, Mnih et al. 2015, https://doi.org/10.1038/nature14236, as
    a fraction rather than in percent.

    Args:
      game: A game of the table, in either spelling.
      score: Unclipped return in points, a number or an array of any shape, which the
        result has too.

    Raises:
      ValueError: The table has no such game.
    """
    random, human = reference_scores(game)
    return (score - random) / (human - random)


def canonical_game(game: str) -> str:
    """Returns a game's name as the tables spell it, such as `up_n_down`.

    Args:
      game: The name in either spelling; case, underscores, spaces and a version suffix
        (`-v5`) do not matter.

    Raises:
      ValueError: The table has no such game; the message names the nearest ones.
    """
    names = _names_by_key()
    key = _key(game)
    if key not in names:
        nearest = (names[near] for near in difflib.get_close_matches(key, names, n=3))
        hint = ", ".join(nearest) or "none is near"
        raise ValueError(f"No random and human scores for {game!r} (nearest: {hint}).")
    return names[key]


def camel_case(game: str) -> str:
    """Returns a game's name as EnvPool spells it, such as `UpNDown`.

    Raises:
      ValueError: The table has no such game.
    """
    return "".join(part.capitalize() for part in canonical_game(game).split("_"))


def atari57_games() -> tuple[str, ...]:
    """Returns the games that have random and human scores, in alphabetical order."""
    return tuple(sorted(_references()))


def atari26_games() -> tuple[str, ...]:
    """Returns the games of the Atari-100k benchmark, in alphabetical order."""
    return tuple(sorted(published_scores()["APS"]))


@functools.cache
def published_scores() -> Mapping[str, Mapping[str, PublishedCell]]:
    """Returns the published scores: system -> game -> cell, each on the 26 games."""
    table: dict[str, dict[str, PublishedCell]] = {}
    for row in _rows("atari26_published.csv"):
        score, deviation = float(row["score"]), float(row["deviation"] or "nan")
        cell = PublishedCell(score, row["suspect"], row["source"], deviation)
        table.setdefault(row["system"], {})[row["game"]] = cell
    return types.MappingProxyType(
        {system: types.MappingProxyType(cells) for system, cells in table.items()}
    )


def _key(game: str) -> str:
    """Reduces a spelling to lower-case letters and digits, without its version."""
    name = game.rsplit("-v", maxsplit=1)[0]
    return "".join(letter for letter in name.lower() if letter.isalnum())


@functools.cache
def _references() -> dict[str, ReferenceScores]:
    return {
        row["game"]: ReferenceScores(float(row["random"]), float(row["human"]))
        for row in _rows("atari_random_human.csv")
    }


@functools.cache
def _names_by_key() -> dict[str, str]:
    return {_key(name): name for name in _references()}


def _rows(name: str) -> Iterable[dict[str, str]]:
    path = importlib.resources.files("aps_jax.scores") / "data" / name
    return csv.DictReader(path.read_text(encoding="utf-8").splitlines())
