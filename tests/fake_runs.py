"""Writes folders that look like finished runs."""

import json

from aps_jax.scores import scores

PROTOCOL = {
    "episodes": 4,
    "epsilon": 0.001,
    "noop_max": 30,
    "sticky": 0.0,
    "max_frames": 108_000,
}


def result(returns=(1.0, 2.0, 3.0, 6.0), **changes):
    """Returns a valid result: fine-tuning of a pretrained agent on Pong, seed 0."""
    returns = list(returns)
    values = {
        "schema": 1,
        "stage": "finetune",
        "game": "Pong",
        "agent": "aps",
        "seed": 0,
        "preset": "cpu",
        "pretrain_frames": 400_000,
        "finetune_agent_steps": 12_000,
        "init": "pretraining",
        "reward": "score",
        "returns": returns,
        "protocol": {**PROTOCOL, "episodes": len(returns)},
        "wall_seconds": 1.5,
        "frames_per_second": 2.5,
        "device": "cpu",
    }
    values.update(changes)
    if "return_mean" not in values and returns:
        values["return_mean"] = sum(returns) / len(returns)
    return values


def write(folder, values=None, *, options=None, metrics=None):
    """Writes a run's folder; returns it.

    Args:
      folder: Where; made if need be.
      values: What `result.json` holds; None writes none.
      options: What `config.json` holds as its config; None writes none.
      metrics: Text of `metrics.csv`; None writes none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if values is not None:
        (folder / "result.json").write_text(json.dumps(values))
    if options is not None:
        content = {"schema": 1, "stage": "finetune", "config": options}
        (folder / "config.json").write_text(json.dumps(content))
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)
    return folder


def write_arms(root, game, normalized, *, spread=0.0, agent="aps", **changes):
    """Writes both arms of several seeds of one game.

    Args:
      root: Folder of the runs.
      game: A game with random and human scores.
      normalized: arm -> human-normalised score of each seed.
      spread: Points by which a run's four games differ from their mean.
      agent: The agent's name.
      **changes: Further entries of each result.
    """
    random, human = scores.reference_scores(game)
    for arm, values in normalized.items():
        for seed, value in enumerate(values):
            mean = random + (human - random) * value
            returns = [mean - spread, mean + spread, mean, mean]
            write(
                root / game / agent / str(seed) / arm,
                result(
                    returns,
                    game=scores.camel_case(game),
                    agent=agent,
                    seed=seed,
                    init=None if arm == "scratch" else "pretraining",
                    **changes,
                ),
                metrics=(
                    "agent_steps,frames,episode_return,eval_return_mean\n"
                    f"4000,16000,{mean - 1},nan\n"
                    f"8000,32000,{mean - 0.5},{mean - 0.25}\n"
                    f"12000,48000,{mean},{mean}\n"
                ),
            )
