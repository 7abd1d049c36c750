r"""Pretrains agents and controls in MinAtar, then shows them the score: who gains?

  python -m experiments.minatar --seeds=5 --workdir=runs/minatar
  python -m experiments.minatar --minatar_games=Breakout --seeds=2 --workdir=runs/two

`scratch` is double DQN with the same network, from its first step on reward. Seeds of
an arm learn at once. The same command goes on where it stopped. Ends with tables, and
writes them and scores.json to WORKDIR/report. docs/worlds.md says what the columns are.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from aps_jax.envs import worlds
from aps_jax.report import tables
from aps_jax.scores import estimates
from aps_jax.train import recorders, stages
from experiments import arms, common_flags

_SCRATCH = "scratch"
ARMS = {**arms.ARMS, _SCRATCH: {"agent": "dqn"}}
_POINTS = (10_000, 30_000)  # rewarded agent steps, besides all
_OPTIONS = {
    "pretrain_frames": 2_000_000,
    "infer_agent_steps": 5_000,
    "finetune_agent_steps": 100_000,
    "eval_agent_steps": ",".join(map(str, _POINTS)),
}
_GAMES = flags.DEFINE_list(
    "minatar_games",
    ["Breakout", "Asterix", "SpaceInvaders"],
    f"Some of {', '.join(worlds.MINATAR)}, separated by commas.",
)
_ARMS = flags.DEFINE_list(
    "minatar_arms", list(ARMS), f"Some of {', '.join(ARMS)}, separated by commas."
)


def main(argv: Sequence[str]) -> None:
    """Runs what is missing, and reports."""
    common_flags.reject_words(argv)
    workdir = common_flags.workdir_from_flags()
    arms.run(workdir, make_cells(workdir), run_cell, make_tables)


def make_cells(workdir: pathlib.Path) -> list[arms.Cell]:
    """Returns what the flags ask for, game by game.

    Raises:
      ValueError: A game or an arm does not exist, or an option is of one arm's own.
    """
    arms.check_known("game", _GAMES.value, list(worlds.MINATAR))
    arms.check_known("arm", _ARMS.value, list(ARMS))
    asked = {name: ARMS[name] for name in _ARMS.value}
    return arms.make_cells(workdir, "minatar", _GAMES.value, asked, lambda _: _OPTIONS)


def run_cell(cell: arms.Cell, **watched: Any) -> list[dict[str, Any]]:
    """Pretrains the seeds of an arm, and fine-tunes them.

    Args:
      cell: The arm.
      **watched: As for `stages.pretrain_runs`; so are the errors.

    Returns:
      For each seed what the tables show.
    """
    tuned = recorders.make_runs(cell.config, cell.folder / "finetune", cell.seeds)
    inits: list[pathlib.Path] | None = None
    shown: list[dict[str, Any]] = [{} for _ in tuned.configs]
    if cell.arm != _SCRATCH:
        runs = recorders.make_runs(cell.config, cell.folder / "pretrain", cell.seeds)
        results = stages.pretrain_runs(runs, **watched)
        inits = list(runs.configs)
        shown = [
            {
                **{name: result["skill_following"][name] for name in _FOLLOWING},
                "visited": result["last_metrics"]["visited"],
            }
            for result in results
        ]
    for row, result in zip(
        shown, stages.finetune_runs(tuned, inits, **watched), strict=True
    ):
        played = result["evaluations"]
        if inits is not None:
            row["zero_shot"] = played[0]["eval_return_mean"]
        for steps in _POINTS:
            # The first evaluation from then on: steps are whole iterations.
            later = [e for e in played if e["agent_steps"] >= steps]
            row[f"after_{steps}"] = later[0]["eval_return_mean"]
        row["after_all"] = played[-1]["eval_return_mean"]
    return shown


_FOLLOWING = ("mean", "predicted", "met")
_RETURNS = {
    **{f"after_{steps}": f"{steps:,} steps" for steps in _POINTS},
    "after_all": "all steps",
}
_COLUMNS = {
    "mean": "skill following",
    "predicted": "predicted",
    "met": "met",
    "visited": "states visited",
    "zero_shot": "zero-shot",
    **_RETURNS,
}


def make_tables(found: arms.Found) -> list[tables.Table]:
    """Makes a table of each game, and one of what beats learning from scratch."""
    games = list(dict.fromkeys(game for game, _ in found))
    made = [arms.make_table(game, [game], _COLUMNS, found) for game in games]
    names = list(dict.fromkeys(arm for _, arm in found))
    others = [arm for arm in names if arm != _SCRATCH]
    if len(others) == len(names) or not others:
        return made

    def returns(arm: str, column: str) -> list[list[float]]:
        return [[row[column] for row in found[game, arm]] for game in games]

    rows = []
    for arm in others:
        rows.append({"arm": arm})
        for column, shown in _RETURNS.items():
            both = returns(arm, column), returns(_SCRATCH, column)
            rows[-1][shown] = arms.estimate(estimates.probability_of_improvement, *both)
    note = (
        "That a run of the arm beats one from scratch in a game drawn at random, with "
        "95 % intervals."
    )
    return [*made, tables.make_table("P(improvement over scratch)", rows, note)]


if __name__ == "__main__":
    common_flags.run(main, short=(*common_flags.SHORT, "seeds"))
