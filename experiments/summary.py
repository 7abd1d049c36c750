"""What scripts print of a result: the score beside random and human, and the protocol."""

import statistics
from typing import Any

import rich.console
import rich.table

from aps_jax import config as config_lib
from aps_jax.envs import reward_functions
from aps_jax.report import tables
from aps_jax.scores import protocol, scores
from aps_jax.train import evaluation

_SMALL_BUDGET = (
    "This budget is small: it shows that the machine works, not what the method "
    "reaches. The talk's budget is 200M frames without reward on a GPU."
)


def print_results(
    config: config_lib.Config, results: dict[str, dict[str, Any]]
) -> None:
    """Prints a table with a row per arm, and how the games were played."""
    task = config.finetune.task
    is_score = task == reward_functions.SCORE
    reference = scores.find_reference_scores(config.game) if is_score else None
    table = rich.table.Table(
        title=f"{config.game}: "
        + ("points per game" if is_score else f"return of the task {task} per game")
    )
    # Of another task the game's score is shown beside its return.
    columns = ("return", "min to max", "score", "zero-shot")
    if is_score:
        columns = ("score", "min to max", "human-normalized", "zero-shot")
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right")
    for arm, result in results.items():
        returns = result["returns"]
        normalized = result["human_normalized_score"]
        if is_score:
            third = "-" if normalized is None else f"{normalized:.3f}"
        else:
            third = f"{statistics.fmean(result['score_returns']):.1f}"
        table.add_row(
            arm,
            f"{result['return_mean']:.1f}",
            f"{min(returns):.0f} to {max(returns):.0f}",
            third,
            _zero_shot(result),
        )
    if reference is not None:
        table.add_row("random", f"{reference.random:.1f}", "", "0", "")
        table.add_row("human", f"{reference.human:.1f}", "", "1", "")
    console = rich.console.Console()
    console.print(table)
    console.print(
        f"Protocol: {protocol.text(evaluation.protocol_of(config))}.",
        soft_wrap=True,
        highlight=False,
    )
    if config.preset in ("smoke", "cpu"):
        console.print(_SMALL_BUDGET, soft_wrap=True)


def print_tasks(config: config_lib.Config, results: list[dict[str, Any]]) -> None:
    """Prints a row for each task of a pretrained agent, and how the games were played.

    Args:
      config: The run's values.
      results: From `zero_shot.to_dict`.
    """
    rows = []
    for result in results:
        inferred, played, random = (
            result[name] for name in ("inferred", "zero_shot", "random")
        )
        rows.append(
            (
                result["name"] + (" (random w)" if inferred["is_fallback"] else ""),
                f"{played['return_mean']:,.1f}",
                f"{random['return_mean']:,.1f}",
                f"{played['score_mean']:,.1f}",
                f"{played['length_mean']:,.0f}",
                f"{inferred['r_squared']:.3f}",
                f"{inferred['num_samples']:,} ({inferred['num_nonzero']:,})",
            )
        )
    table = tables.Table(
        f"{config.game}: one pretrained agent, no gradient step",
        (
            "task",
            "zero-shot return",
            "random play",
            "zero-shot score",
            "agent steps per game",
            "R^2",
            "rewards seen (not 0)",
        ),
        tuple(rows),
        (f"Protocol: {protocol.text(evaluation.protocol_of(config))}.",),
    )
    tables.show_tables([table], ())


def _zero_shot(result: dict[str, Any]) -> str:
    """The score right after inference, before any gradient step on the reward."""
    evaluations = result.get("evaluations", [])
    if len(evaluations) < 2:
        return "-"
    return f"{evaluations[0]['eval_return_mean']:.1f}"
