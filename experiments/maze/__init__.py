r"""Runs the method in gridworlds: explore, infer the task, act, all exact.

  python -m experiments.maze --workdir=runs/maze

pretrains each agent in each maze without reward, asks it for 50 random reward
functions it has never seen, and writes `maze.json` (every number, per seed), `table.md`
and the pictures into the work directory. See docs/maze.md for the results, and
docs/tutorial.md for a walk through them.
"""

import sys
from collections.abc import Sequence

from absl import flags

from aps_jax.envs import maze
from aps_jax.parallel import interrupts
from aps_jax.runs import folders
from experiments import common_flags
from experiments.maze import agent, evaluation, figures, grid, options

_PATIENCE_SECONDS = 1.5  # A pretraining is one computation, of which nothing is saved.
_NUM_SEEDS = 10
_NAME = "maze.json"

_MAZES = flags.DEFINE_list("mazes", list(maze.MAPS), "Mazes, with commas between.")
_AGENTS = flags.DEFINE_list(
    "maze_agents", [*agent.AGENTS, grid.RANDOM], "Agents, with commas between."
)


def main(argv: Sequence[str]) -> None:
    """Runs the grid that the flags name, and prints its table."""
    common_flags.reject_words(argv)
    options.check_names("mazes", _MAZES.value, list(maze.MAPS))
    options.check_names("maze_agents", _AGENTS.value, [*agent.AGENTS, grid.RANDOM])
    settings = (
        _AGENTS.value,
        options.seeds_from_flags(_NUM_SEEDS),
        options.agent_config_from_flags(),
        evaluation.TestConfig(num_rewards=options.REWARDS.value),
    )
    workdir, earlier = options.open_workdir(_NAME, grid.describe(*settings))
    with interrupts.StopRequests(patience_seconds=_PATIENCE_SECONDS) as stop:
        print(f"{len(_MAZES.value)} mazes, stopped between two.", file=sys.stderr)
        for result in grid.run_grid(_MAZES.value, *settings, earlier):
            result["table"] = grid.summarise(result)
            folders.write_json(workdir / _NAME, result)
            folders.write_text(workdir / "table.md", grid.format_table(result))
            figures.draw_all(result, workdir)
            done = ", ".join(result["mazes"])
            print(f"{result['wall_seconds']:.0f} s: {done}", file=sys.stderr)
            stop.check()
    print(grid.format_table(result))
