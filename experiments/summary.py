"""What scripts show of a result: its scores, how the games were played, a gif."""

import statistics
from typing import Any

import numpy as np

from aps_jax import config as config_lib
from aps_jax.envs import reward_functions
from aps_jax.report import tables
from aps_jax.scores import protocol, scores
from aps_jax.train import evaluation

_SMALL_BUDGET = (
    "This budget is small: it shows that the machine works, not what the method "
    "reaches. The talk's budget is 200M frames without reward on a GPU."
)


def reference_of(config: config_lib.Config) -> scores.ReferenceScores | None:
    """Returns random and human scores where a run's returns may stand beside them."""
    is_score = config.finetune.reward == reward_functions.SCORE
    if not is_score or not protocol.is_comparable(evaluation.protocol_of(config)):
        return None
    return scores.find_reference_scores(config.game)


def print_results(
    config: config_lib.Config, results: dict[str, dict[str, Any]]
) -> None:
    """Prints a table with a row per arm, and how the games were played."""
    reward = config.finetune.reward
    is_score = reward == reward_functions.SCORE
    rows = []
    for arm, result in results.items():
        returns, evaluations = result["returns"], result.get("evaluations", [])
        row = {
            "": arm,
            "score" if is_score else "return": f"{result['return_mean']:.1f}",
            "min to max": f"{min(returns):.0f} to {max(returns):.0f}",
        }
        if is_score:
            share = result["human_normalized_score"]
            row["human-normalized"] = "-" if share is None else f"{share:.3f}"
        else:
            row["score"] = f"{statistics.fmean(result['score_returns']):.1f}"
        # Right after inference, before any gradient step on the reward.
        first = evaluations[0]["eval_return_mean"] if len(evaluations) > 1 else None
        rows.append({**row, "zero-shot": "-" if first is None else f"{first:.1f}"})
    if (reference := reference_of(config)) is not None:
        for normalized, (name, points) in enumerate(reference._asdict().items()):
            cells = (name, f"{points:.1f}", "", str(normalized), "")
            rows.append(dict(zip(rows[0], cells, strict=True)))
    of = "points" if is_score else f"return of the reward function {reward}"
    notes = [f"Protocol: {protocol.text(evaluation.protocol_of(config))}."]
    if config.preset in ("smoke", "cpu"):
        notes.append(_SMALL_BUDGET)
    table = tables.make_table(f"{config.game}: {of} per game", rows, *notes)
    tables.show_tables([table])


def print_rewards(config: config_lib.Config, results: list[dict[str, Any]]) -> None:
    """Prints a row for each result of `zero_shot.to_dict`."""
    rows = []
    for result in results:
        adapted, played = result["adapted"], result["zero_shot"]
        skills = result.get("random_tasks")
        fallback = " (random w)" if adapted["is_fallback"] else ""
        rows.append(
            {
                "reward": result["reward"] + fallback,
                "zero-shot return": f"{played['return_mean']:,.1f}",
                "random tasks": f"{skills['return_mean']:,.1f}" if skills else "-",
                "random play": f"{result['random']['return_mean']:,.1f}",
                "zero-shot score": f"{played['score_mean']:,.1f}",
                "agent steps per game": f"{played['length_mean']:,.0f}",
                "R^2": f"{adapted['r_squared']:.3f}",
                "rewards seen (not 0)": f"{adapted['num_samples']:,} "
                f"({adapted['num_nonzero']:,})",
            }
        )
    table = tables.make_table(
        f"{config.game}: one pretrained agent, no gradient step",
        rows,
        f"Protocol: {protocol.text(evaluation.protocol_of(config))}.",
    )
    tables.show_tables([table])


def film(
    config: config_lib.Config, player: evaluation.Player, state: Any, **options: Any
) -> list[np.ndarray]:
    """Returns the pictures of one game; `options` are of `evaluation.evaluate`."""
    played = evaluation.evaluate(
        config_lib.replace_options(config, eval_episodes=1),
        player,
        state,
        record_games=1,
        only_record=True,
        **options,
    )
    return played.pictures[0]
