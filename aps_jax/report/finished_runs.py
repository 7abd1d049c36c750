"""Finds finished runs below given folders and reads what they left there.

A run's folder holds `result.json` once it is done, `config.json` from its start, and
`metrics.csv`. What cannot be used is named in a notice and left out of every number.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax import config
from aps_jax.envs import reward_functions
from aps_jax.runs import metrics
from aps_jax.scores import scores

SCHEMA = 1
PRETRAINED, SCRATCH = "pretrained", "scratch"
BUDGETS = ("pretrain_frames", "finetune_agent_steps")
_PROTOCOL = "protocol."
_TYPES = {"stage": str, "game": str, "agent": str, "seed": int}
_TYPES |= {"reward": str, "returns": list, "protocol": dict}


class Curve(NamedTuple):
    """Returns over the part of a run that sees the reward."""

    agent_steps: np.ndarray  # [N] float64, ascending.
    returns: np.ndarray  # [N] float64, points.


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run with a score: who played what, how it was trained, what it scored."""

    path: pathlib.Path
    game: str  # The tables' spelling where they have the game, else as written.
    agent: str
    arm: str  # "pretrained" or "scratch", or the stage where that is no fine-tuning.
    seed: int
    returns: np.ndarray  # [games] float64, unclipped returns of the final evaluation.
    settings: Mapping[str, Any]  # Must be equal for two runs to be averaged.


class Collection(NamedTuple):
    """The runs that can be reported, and a notice for everything that cannot."""

    runs: tuple[FinishedRun, ...]
    notices: tuple[str, ...]


class _UnusableResultError(ValueError):
    """A `result.json` cannot be reported; the message is the reason."""


class _OtherRewardError(_UnusableResultError):
    """A result is sound, but its returns are not the game's score."""


def collect(run_dirs: Sequence[str | os.PathLike]) -> Collection:
    """Finds and reads every finished run in or below the folders `run_dirs`.

    Returns:
      The runs in the order of their paths, without duplicates, and the notices.

    Raises:
      ValueError: A folder does not exist, or none of them holds a finished run.
    """
    results, unfinished = _find(run_dirs)
    runs: list[FinishedRun] = []
    options: list[dict[str, Any] | None] = []
    notices: list[str] = []
    pretraining: list[pathlib.Path] = []
    other_rewards: list[pathlib.Path] = []
    for path in results:
        try:
            result = _read_json(path)
            if "arms" in result:  # Each arm has a folder of its own.
                continue
            if result.get("stage") == "pretrain":
                pretraining.append(path.parent)
                continue
            run = _parse(path.parent, result)
        except _OtherRewardError:
            other_rewards.append(path)
        except _UnusableResultError as error:
            notices.append(f"{path}: {error}; left out.")
        else:
            runs.append(run)
            options.append(_read_options(path.parent, run.arm))
    tuned = {parent for run in runs for parent in run.path.parents}
    pretraining = [path for path in pretraining if path.parent not in tuned]
    for reason, paths in {
        "pretraining folders hold no score": pretraining,
        "results are of other reward functions than the game's score": other_rewards,
    }.items():
        if paths:
            notices.append(f"{len(paths)} {reason} (first: {paths[0]}); left out.")
    notices += [
        f"{path}: unfinished (no result.json); left out." for path in unfinished
    ]
    if not runs:
        looked = ", ".join(str(path) for path in run_dirs) or "no folder at all"
        reason = f" ({notices[0]})" if notices else ""
        raise ValueError(f"No finished run with a score in {looked}.{reason}")

    if None not in options:
        runs = [
            dataclasses.replace(run, settings={**run.settings, **(one or {})})
            for run, one in zip(runs, options, strict=True)
        ]
    elif any(options):
        notices.append(
            f"{options.count(None)} of {len(runs)} runs have no readable config.json: "
            "options are not compared, only what result.json tells."
        )
    runs, duplicates = _without_duplicates(runs)
    return Collection(tuple(runs), tuple(notices + duplicates))


def protocol_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a run's settings that says how it was evaluated."""
    names = (name for name in settings if name.startswith(_PROTOCOL))
    return {name.removeprefix(_PROTOCOL): settings[name] for name in names}


def compared_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that must be equal for two runs to be averaged.

    Args:
      options: Values by option name; those that `config` does not declare are compared.
    """
    fields = config.all_option_fields()
    return {
        name: value
        for name, value in options.items()
        if name not in fields or fields[name].metadata["compared"]
    }


def read_curves(run: FinishedRun) -> tuple[Curve | None, Curve | None]:
    """Reads a run's learning curves from its `metrics.csv`.

    Returns:
      Games played while learning, and full games apart from training; each is None
      where the file is absent, broken, or has no such return.
    """
    try:
        columns = metrics.read_metrics(run.path / metrics.FILE_NAME)
    except (OSError, ValueError, IndexError):
        return None, None
    steps = np.array(columns.get("agent_steps", []), np.float64)

    def curve(name: str) -> Curve | None:
        returns = np.array(columns.get(name, np.full_like(steps, np.nan)), np.float64)
        known = np.isfinite(returns)
        return Curve(steps[known], returns[known]) if known.any() else None

    return curve("episode_return"), curve("eval_return_mean")


def _find(
    run_dirs: Sequence[str | os.PathLike],
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns every `result.json`, and every folder of a run that has none."""
    results: dict[pathlib.Path, pathlib.Path] = {}
    started: dict[pathlib.Path, pathlib.Path] = {}
    for given in map(pathlib.Path, run_dirs):
        if not given.is_dir():
            raise ValueError(f"No such folder: {given}.")
        for folder, subfolders, names in os.walk(given):
            # Checkpoints may hold thousands of files, and never a result.
            subfolders[:] = sorted(set(subfolders) - {"checkpoints"})
            path = pathlib.Path(folder)
            if "result.json" in names:
                results.setdefault(path.resolve(), path)
            elif "config.json" in names:
                started.setdefault(path.resolve(), path)
    finished = {parent for result in results for parent in result.parents}
    unfinished = [path for where, path in started.items() if where not in finished]
    return [path / "result.json" for path in results.values()], unfinished


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _UnusableResultError(f"not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise _UnusableResultError("not a JSON object")
    if content.get("schema") != SCHEMA:
        raise _UnusableResultError(
            f"schema {content.get('schema')!r}, this report reads schema {SCHEMA}"
        )
    return content


def _parse(folder: pathlib.Path, result: dict[str, Any]) -> FinishedRun:
    """Checks a result of this schema and returns its run."""
    if "rewards" in result:
        raise _OtherRewardError("it holds several reward functions, without learning")
    for name, expected in _TYPES.items():
        if type(result.get(name)) is not expected:
            raise _UnusableResultError(
                f"{name} must be of type {expected.__name__}, got {result.get(name)!r}"
            )
    if (reward := result["reward"]) != reward_functions.SCORE:
        raise _OtherRewardError(f"returns of {reward!r} are not the game's score")
    if not result["returns"] or not all(map(_is_finite, result["returns"])):
        raise _UnusableResultError(
            f"returns must be finite numbers, at least one, got {result['returns'][:3]}"
        )
    returns = np.array(result["returns"], np.float64)
    stage, game = result["stage"], result["game"]
    if scores.find_reference_scores(game) is not None:
        game = scores.canonical_game(game)
    arm = stage
    if stage == "finetune":
        arm = SCRATCH if result.get("init") is None else PRETRAINED
    settings = {
        name: result.get(name)
        for name in ("preset", *BUDGETS)
        if name != "pretrain_frames" or arm != SCRATCH
    }
    settings |= {_PROTOCOL + name: value for name, value in result["protocol"].items()}
    who = (result["agent"], arm, result["seed"])
    return FinishedRun(folder, game, *who, returns, settings)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read_options(folder: pathlib.Path, arm: str) -> dict[str, Any] | None:
    """Returns the options in `config.json` that define a method, however nested."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        options = dict(_leaves(content["config"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    fields = config.option_fields(config.DEFAULT_AGENT)  # All agents have these stages.
    return {
        name: value
        for name, value in compared_options(options).items()
        # Scratch had no pretraining, whatever its config says of it.
        if arm != SCRATCH or name not in fields or fields[name][0] != "pretrain"
    }


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield name, value


def _without_duplicates(
    runs: Sequence[FinishedRun],
) -> tuple[list[FinishedRun], list[str]]:
    """Keeps the first of the runs that differ in nothing but their folder."""
    kept: dict[tuple[Any, ...], FinishedRun] = {}
    notices = []
    for run in runs:
        settings = json.dumps(run.settings, sort_keys=True)
        key = (run.game, run.agent, run.arm, run.seed, settings)
        first = kept.setdefault(key, run)
        if first is not run:
            same = f"{run.game}, {run.agent} {run.arm}, seed {run.seed}"
            notices.append(f"{run.path}: duplicate of {first.path} ({same}); left out.")
    return list(kept.values()), notices
