r"""Runs the paper's claims in gridworlds: explore, infer the task, act, all exact.

  python -m experiments.maze --workdir=runs/maze

pretrains each agent in each maze without reward, asks it for 50 random reward
functions it has never seen, and writes `maze.json` (every number, per seed), `table.md`
and the pictures into the work directory. See docs/maze.md for the results, and
docs/tutorial.md for a walk through them.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging

from aps_jax.envs import maze
from aps_jax.parallel import interrupts
from aps_jax.runs import folders
from experiments import maze_agent, maze_evaluation, maze_grid, maze_plots

# A pretraining is one long computation that nothing can be saved of.
_PATIENCE_SECONDS = 1.5
_NAME = "maze.json"

_AGENT_NAMES = [*maze_grid.AGENT_WEIGHTS, maze_grid.RANDOM]

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for maze.json, table.md and the pictures.", required=True
)
_MAZES = flags.DEFINE_list(
    "mazes", list(maze.MAPS), "Mazes to run, by name, separated by commas."
)
_AGENTS = flags.DEFINE_list(
    "agents", _AGENT_NAMES, "Agents to run, by name, separated by commas."
)
_NUM_SEEDS = flags.DEFINE_integer(
    "num_seeds", 10, "Seeds for each maze and agent.", lower_bound=1
)
_FIRST_SEED = flags.DEFINE_integer(
    "first_seed", 0, "The first seed; the others follow it.", lower_bound=0
)
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "FIELD=VALUE of the pretrained agent, such as task_hold=10; may be repeated. The "
    "fields are those of AgentConfig in experiments/maze_agent.py.",
)
_REWARDS = flags.DEFINE_integer(
    "rewards", 50, "Random reward functions asked of each agent.", lower_bound=1
)
_PICTURES = flags.DEFINE_bool("pictures", True, "Whether to draw the pictures.")


def _check_names(names: Sequence[str], known: Sequence[str]) -> bool:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) != len(names):
        raise flags.ValidationError(
            f"must name some of {', '.join(known)}, each once; got "
            f"{', '.join(names) or 'nothing'}."
        )
    return True


flags.register_validator("mazes", lambda v: _check_names(v, list(maze.MAPS)))
flags.register_validator("agents", lambda v: _check_names(v, _AGENT_NAMES))


def write(result: dict[str, Any], workdir: pathlib.Path) -> None:
    """Writes the result, its table and its pictures."""
    result["table"] = maze_grid.summarise(result)
    folders.write_json(workdir / _NAME, result)
    folders.write_text(workdir / "table.md", maze_grid.format_table(result))
    if _PICTURES.value:
        maze_plots.draw_all(result, str(workdir))
    logging.info("Wrote the results of %s", ", ".join(result["mazes"]))


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    try:
        agent_config = maze_agent.agent_config_from(_SET.value)
    except ValueError as error:
        raise app.UsageError(f"--set: {error}") from error
    test_config = maze_evaluation.TestConfig(num_rewards=_REWARDS.value)
    seeds = list(range(_FIRST_SEED.value, _FIRST_SEED.value + _NUM_SEEDS.value))
    description = maze_grid.describe(_AGENTS.value, seeds, agent_config, test_config)
    try:
        workdir = pathlib.Path(_WORKDIR.value)
        earlier = maze_grid.open_workdir(workdir, _NAME, description)
    except (OSError, ValueError) as error:
        raise app.UsageError(f"--workdir={_WORKDIR.value}: {error}") from error

    with interrupts.StopRequests(patience_seconds=_PATIENCE_SECONDS) as stop:
        logging.info("%d mazes, stopped and continued between two.", len(_MAZES.value))
        try:
            for result in maze_grid.run_grid(
                _MAZES.value, _AGENTS.value, seeds, agent_config, test_config, earlier
            ):
                write(result, workdir)
                stop.check()
        except interrupts.Interrupted as error:
            print(error, file=sys.stderr)
            sys.exit(interrupts.EXIT_CODE)
    print(maze_grid.format_table(result))


if __name__ == "__main__":
    app.run(main)
