"""Finds finished runs below given folders and reads what they left there.

A run's folder holds `result.json` once it is done, `config.json` from its start, and
`metrics.csv`. Whatever cannot be used is named in one line and left out; it never
turns up in a number.
"""

import csv
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax import config
from aps_jax.envs import reward_functions
from aps_jax.scores import scores

SCHEMA = 1

# Options that cannot change what a run learns or scores, or that `result.json` itself
# tells: two runs that differ in these alone are two runs of one method.
_NOT_COMPARED = frozenset(
    {
        "agent",
        "checkpoint_agent_steps",
        "env_threads",
        "eval_agent_steps",
        "eval_episodes",
        "eval_epsilon",
        "evaluations",
        "finetune_agent_steps",
        "game",
        "max_frames",
        "noop_max",
        "preset",
        "pretrain_frames",
        "report_agent_steps",
        "seed",
        "sticky",
        "wandb",
    }
)
_STEP_COLUMNS = ("agent_steps", "finetune_agent_steps")
_EVALUATION_COLUMNS = ("eval_return_mean",)
_TRAINING_COLUMNS = ("episode_return", "episode_return_mean")


class Curve(NamedTuple):
    """Returns over the part of a run that sees the reward."""

    agent_steps: np.ndarray  # [N] float64, ascending, 0 where that part begins.
    returns: np.ndarray  # [N] float64, points.


class Curves(NamedTuple):
    """A run's learning curves; None where its `metrics.csv` does not tell."""

    training: Curve | None  # Games played while learning.
    evaluation: Curve | None  # Full games apart from training.


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: who played what, how it was trained, what it scored."""

    path: pathlib.Path
    game: str  # The tables' spelling where they have the game, else as written.
    agent: str
    arm: str  # "pretrained" or "scratch", or the stage where that is no fine-tuning.
    seed: int
    returns: np.ndarray  # [games] float64, unclipped returns of the final evaluation.
    settings: Mapping[str, Any]  # Must be equal for two runs to be averaged.


class Collection(NamedTuple):
    """The runs that can be reported, and a line for everything that cannot."""

    runs: tuple[Run, ...]
    notices: tuple[str, ...]


class UnusableResultError(ValueError):
    """A `result.json` cannot be reported; the message is the reason."""


class OtherTaskError(UnusableResultError):
    """A result is sound, but its returns are not the game's score."""


def collect(run_dirs: Sequence[str | os.PathLike]) -> Collection:
    """Finds and reads every finished run in or below `run_dirs`.

    Args:
      run_dirs: Folders of single runs, of paired arms, or of many runs at any depth.

    Returns:
      The runs in the order of their paths, without duplicates, and the notices.

    Raises:
      ValueError: A folder does not exist, or none of them holds a finished run.
    """
    results, unfinished = _find(run_dirs)
    notices = []
    runs, options = [], []
    pretraining, other_tasks = [], []
    for path in results:
        try:
            for folder, result in _arms(path.parent, _read_json(path), results):
                if result.get("stage") == "pretrain":
                    pretraining.append(folder)
                    continue
                run, complaints = _parse(folder, result)
                runs.append(run)
                options.append(_read_options(path.parent))
                notices += [f"{path}: {complaint}." for complaint in complaints]
        except OtherTaskError:
            other_tasks.append(path)
        except UnusableResultError as error:
            notices.append(f"{path}: {error}; left out.")
    pretraining = [
        path
        for path in pretraining
        if not any(path.parent in run.path.parents for run in runs)
    ]
    if pretraining:
        notices.append(
            f"{len(pretraining)} pretraining folders hold no score (first: "
            f"{pretraining[0]}); left out."
        )
    if other_tasks:
        notices.append(
            f"{len(other_tasks)} results are of other tasks than the game's score (first: "
            f"{other_tasks[0]}); left out."
        )
    notices += [
        f"{path}: unfinished (no result.json); left out." for path in unfinished
    ]
    if not runs:
        looked = ", ".join(str(path) for path in run_dirs) or "no folder at all"
        reason = f" ({notices[0]})" if notices else ""
        raise ValueError(f"No finished run with a score in {looked}.{reason}")

    if all(option is not None for option in options):
        runs = [
            dataclasses.replace(
                run, settings={**run.settings, **_compared(run, option)}
            )
            for run, option in zip(runs, options, strict=True)
        ]
    elif any(option is not None for option in options):
        without = sum(option is None for option in options)
        notices.append(
            f"{without} of {len(runs)} runs have no readable config.json: options are "
            "not compared, only what result.json tells."
        )
    runs, duplicates = _without_duplicates(runs)
    return Collection(tuple(runs), tuple(notices + duplicates))


def read_curves(run: Run) -> Curves:
    """Reads a run's learning curves from its `metrics.csv`.

    Rows of pretraining are left out. Where steps are counted on from pretraining, they
    are shifted to begin at 0.

    Args:
      run: A run that `collect` returned.

    Returns:
      The curves, each None where the file is absent or tells no such return.
    """
    path = run.path / "metrics.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                row for row in csv.DictReader(file) if row.get("stage") != "pretrain"
            ]
    except (OSError, UnicodeDecodeError, csv.Error):
        return Curves(None, None)
    steps = np.array([_agent_steps(row) for row in rows], np.float64)
    budget = run.settings.get("finetune_agent_steps") or math.inf
    if np.isfinite(steps).any() and np.nanmin(steps) > budget:
        steps = steps - np.nanmin(steps)

    def curve(columns: Sequence[str]) -> Curve | None:
        for column in columns:
            returns = np.array([_number(row.get(column)) for row in rows], np.float64)
            known = np.isfinite(steps) & np.isfinite(returns)
            if known.any():
                order = np.argsort(steps[known], kind="stable")
                return Curve(steps[known][order], returns[known][order])
        return None

    return Curves(curve(_TRAINING_COLUMNS), curve(_EVALUATION_COLUMNS))


def _find(
    run_dirs: Sequence[str | os.PathLike],
) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns every `result.json`, and every folder of a run that has none."""
    results: dict[pathlib.Path, pathlib.Path] = {}
    started: dict[pathlib.Path, pathlib.Path] = {}
    for given in map(pathlib.Path, run_dirs):
        if given.name == "result.json" and given.is_file():
            given = given.parent
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
    unfinished = [
        path
        for resolved, path in started.items()
        if not any(resolved in result.parents for result in results)
    ]
    return [path / "result.json" for path in results.values()], unfinished


def _arms(
    folder: pathlib.Path, result: dict[str, Any], results: Sequence[pathlib.Path]
) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """Returns the results that one file stands for, each with its folder.

    A run of paired arms repeats theirs at its top. They count once: from their own
    folders where those are there, else from the copy.
    """
    if not isinstance(result.get("arms"), dict):
        return [(folder, result)]
    if any(folder in path.parent.parents for path in results):
        return []
    return [(folder / name, arm) for name, arm in result["arms"].items()]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnusableResultError(f"not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UnusableResultError("not a JSON object")
    if content.get("schema") != SCHEMA:
        raise UnusableResultError(
            f"schema {content.get('schema')!r}, this report reads schema {SCHEMA}"
        )
    return content


def _parse(folder: pathlib.Path, result: dict[str, Any]) -> tuple[Run, list[str]]:
    """Checks a result of this schema; returns its run and what is odd about it."""
    expected_types = {
        "stage": str,
        "game": str,
        "agent": str,
        "seed": int,
        "returns": list,
        "protocol": dict,
    }
    if "tasks" in result:
        raise OtherTaskError("it holds several tasks, played without learning")
    for name, expected in expected_types.items():
        if type(result.get(name)) is not expected:
            raise UnusableResultError(
                f"{name} must be of type {expected.__name__}, got {result.get(name)!r}"
            )
    # What fine-tuning inferred, its name included, or the name alone.
    task = result.get("task") or reward_functions.SCORE
    if isinstance(task, dict):
        task = task.get("name", reward_functions.SCORE)
    if task != reward_functions.SCORE:
        raise OtherTaskError(f"returns of the task {task!r} are not the game's score")
    returns = result["returns"]
    if not returns or not all(
        type(value) in (int, float) and math.isfinite(value) for value in returns
    ):
        raise UnusableResultError(
            "returns must be finite numbers, at least one, got "
            f"{returns[:3]}{'...' if len(returns) > 3 else ''}"
        )
    returns = np.array(returns, np.float64)
    reference = scores.find_reference_scores(result["game"])
    game = scores.canonical_game(result["game"]) if reference else result["game"]
    if result["stage"] == "finetune":
        arm = "scratch" if result.get("init") is None else "pretrained"
    else:
        arm = result["stage"]
    settings = {
        "preset": result.get("preset"),
        "finetune_agent_steps": result.get("finetune_agent_steps"),
        **{f"protocol.{name}": value for name, value in result["protocol"].items()},
    }
    if arm != "scratch":
        settings["pretrain_frames"] = result.get("pretrain_frames")

    complaints = []
    episodes = result["protocol"].get("episodes")
    if episodes != returns.size:
        complaints.append(
            f"{returns.size} games were evaluated, its protocol says {episodes}"
        )
    written = result.get("return_mean")
    if written is not None and not _close(written, returns.mean()):
        complaints.append(
            f"return_mean is {written}, its returns give {returns.mean():.6g}, which "
            "is used"
        )
    written = result.get("human_normalized_score")
    if reference is not None and written is not None:
        computed = scores.human_normalized_score(game, float(returns.mean()))
        if not _close(written, computed):
            complaints.append(
                f"human_normalized_score is {written}, its returns give "
                f"{computed:.6g}, which is used"
            )
    run = Run(folder, game, result["agent"], arm, result["seed"], returns, settings)
    return run, complaints


def _close(written: Any, computed: float) -> bool:
    """Tells whether a written number is `computed`, rounded to three decimals."""
    return type(written) in (int, float) and math.isclose(
        written, computed, rel_tol=1e-3, abs_tol=1e-3
    )


def _read_options(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the options in a run's `config.json`, however they are nested."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    if not isinstance(content, dict):
        return None
    known = config.option_fields()
    return {name: value for name, value in _leaves(content) if name in known}


def _leaves(tree: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield name, value


def _compared(run: Run, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that define a run's method; scratch had no pretraining."""
    fields = config.option_fields()
    return {
        name: value
        for name, value in options.items()
        if name not in _NOT_COMPARED
        and not (run.arm == "scratch" and fields[name][0] == "pretrain")
    }


def _without_duplicates(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """Keeps the first of the runs that differ in nothing but their folder."""
    kept: dict[tuple, Run] = {}
    notices = []
    for run in runs:
        settings = json.dumps(run.settings, sort_keys=True)
        key = (run.game, run.agent, run.arm, run.seed, settings)
        if key in kept:
            notices.append(
                f"{run.path}: duplicate of {kept[key].path} ({run.game}, {run.agent} "
                f"{run.arm}, seed {run.seed}); left out."
            )
        else:
            kept[key] = run
    return list(kept.values()), notices


def _agent_steps(row: Mapping[str, str]) -> float:
    for column in _STEP_COLUMNS:
        steps = _number(row.get(column))
        if math.isfinite(steps):
            return steps
    return _number(row.get("frames")) / config.FRAME_SKIP


def _number(text: str | None) -> float:
    """Returns a CSV cell as a number, NaN where it is empty, absent or no number."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
