"""What scripts print of a result: the score beside random and human, and the protocol."""

from typing import Any

import rich.console
import rich.table

from aps_jax import config as config_lib
from aps_jax import evaluation, scores

VIDEO_AGENT_STEPS = 900  # one minute of play

_SMALL_BUDGET = (
    "This budget is small: it shows that the machine works, not what the method "
    "reaches. The talk's budget is 200M frames without reward on a GPU."
)


def print_results(
    config: config_lib.Config, results: dict[str, dict[str, Any]]
) -> None:
    """Prints a table with a row per arm, and how the games were played."""
    reference = scores.find_reference_scores(config.game)
    table = rich.table.Table(title=f"{config.game}: points per game")
    for column in ("", "score", "min to max", "human-normalized", "zero-shot"):
        table.add_column(column, justify="left" if not column else "right")
    for arm, result in results.items():
        returns = result["returns"]
        normalized = result["human_normalized_score"]
        table.add_row(
            arm,
            f"{result['return_mean']:.1f}",
            f"{min(returns):.0f} to {max(returns):.0f}",
            "-" if normalized is None else f"{normalized:.3f}",
            _zero_shot(result),
        )
    if reference is not None:
        table.add_row("random", f"{reference.random:.1f}", "", "0", "")
        table.add_row("human", f"{reference.human:.1f}", "", "1", "")
    console = rich.console.Console()
    console.print(table)
    console.print(
        f"Protocol: {evaluation.protocol_text(config)}.",
        soft_wrap=True,
        highlight=False,
    )
    if config.preset in ("smoke", "cpu"):
        console.print(_SMALL_BUDGET, soft_wrap=True)


def _zero_shot(result: dict[str, Any]) -> str:
    """The score right after inference, before any gradient step on the reward."""
    evaluations = result.get("evaluations", [])
    if len(evaluations) < 2:
        return "-"
    return f"{evaluations[0]['eval_return_mean']:.1f}"
