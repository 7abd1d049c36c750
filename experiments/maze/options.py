"""The flags that the maze's scripts share: the agent's options and the seeds."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from aps_jax import options
from aps_jax.runs import folders
from experiments import common_flags
from experiments.maze import agent

_OPTIONS = {
    name: common_flags.define_option(name, field)
    for name, field in options.fields_of(agent.AgentConfig).items()
}
REWARDS = flags.DEFINE_integer(
    "rewards", 50, "Random reward functions asked of each agent.", lower_bound=1
)


def agent_config_from_flags() -> agent.AgentConfig:
    """Returns the agent that the flags describe.

    Raises:
      ValueError: An option is of Atari's agents alone, or out of bounds.
    """
    foreign = common_flags.given_options().keys() - _OPTIONS.keys() - {"seed"}
    if foreign:
        raise ValueError(
            f"--{', --'.join(sorted(foreign))}: no option of the maze's agent, which "
            f"has {', '.join(_OPTIONS)}."
        )
    given = {name: holder.value for name, holder in _OPTIONS.items()}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(agent.AgentConfig(), **given)


def seeds_from_flags(num: int) -> list[int]:
    """Returns the seeds that the flags name, by default `num` from `--seed` on."""
    first = common_flags.given_options().get("seed", 0)
    return common_flags.seeds_of_runs() or list(range(first, first + num))


def open_workdir(
    name: str, description: dict[str, Any]
) -> tuple[pathlib.Path, dict[str, Any] | None]:
    """Makes the folder of `--workdir`; returns it, and the result of a stopped run.

    Args:
      name: Of the result's file.
      description: What this run will write of itself there.

    Raises:
      ValueError: The folder cannot be made or written, or its file is damaged or of a
        run with another description.
    """
    workdir = common_flags.workdir_from_flags()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK | os.X_OK):
            raise PermissionError("the folder cannot be written.")
        if not (workdir / name).exists():
            return workdir, None
        earlier = folders.read_json(workdir / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--workdir={workdir}: {error}") from error
    differing = [
        key
        for key, value in description.items()
        if key != "git_commit" and earlier.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"--workdir={workdir} holds a run that differs in {', '.join(differing)}; "
            "give another folder."
        )
    return workdir, earlier


def check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Checks that a flag names some of what there is, each once.

    Raises:
      ValueError: It does not.
    """
    if not names or not set(names) <= set(known) or len(set(names)) != len(names):
        raise ValueError(
            f"--{flag} must name some of {', '.join(known)}, each once; got "
            f"{', '.join(names) or 'nothing'}."
        )
