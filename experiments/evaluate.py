r"""Evaluates an agent: full games, unclipped scores, no learning.

  python -m experiments.evaluate --checkpoint=runs/b --workdir=runs/b_eval --video
  python -m experiments.evaluate --checkpoint=runs/pretrain --workdir=runs/zero \
    --reward=score,survival,my_rewards:stay_left
  python -m experiments.evaluate --checkpoint=runs/pretrain --workdir=runs/grid \
    --video_tasks=9

Game, network and protocol come from the checkpoint's run; flags that are given change
them, and the protocol is printed beside every score. With --reward, or where the folder
is that of a pretraining, the pretrained agent is tried on these reward functions of its
game at once, without a gradient step.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from aps_jax import config as config_lib
from aps_jax.envs import games, reward_functions
from aps_jax.report import run_pictures
from aps_jax.runs import folders
from aps_jax.train import evaluation, stages, zero_shot
from experiments import common_flags, summary

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of the run whose newest agent is evaluated."
)
_VIDEO = flags.DEFINE_bool(
    "video",
    False,
    "Also write WORKDIR/game.gif of one game, or rewards.gif with a game for each "
    "reward function.",
)
_VIDEO_TASKS = flags.DEFINE_integer(
    "video_tasks",
    0,
    "Instead of scores: a grid of videos, each of the game played for another random "
    "task vector of a pretrained agent, as WORKDIR/tasks.gif.",
    lower_bound=0,
    upper_bound=64,
)
_SHORT = (*common_flags.SHORT, "reward")
_CLIP_STEPS = evaluation.VIDEO_AGENT_STEPS // 3  # of each game in a grid


def main(argv: Sequence[str]) -> None:
    """Evaluates the agent that the flags name."""
    common_flags.reject_words(argv)
    workdir = common_flags.workdir_from_flags()
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint=DIR is needed: the folder of a finished run.")
    checkpoint = folders.as_path(_CHECKPOINT.value)
    names = common_flags.given_options().get("reward")
    facts, its_config = folders.read_run(checkpoint)
    # A pretraining alone has seen no reward: it is tried on that of its config.
    if names is None and facts["stage"] == stages.PRETRAIN:
        names = its_config.finetune.reward
    if names is None and not _VIDEO_TASKS.value:
        load = stages.load_finetuned
    else:
        load = stages.load_pretrained
        names = [name.strip() for name in (names or reward_functions.SCORE).split(",")]
        for name in names:
            reward_functions.load(name, its_config.observation)
    trained = load(checkpoint, warn=common_flags.warn)
    config = common_flags.config_from_flags(trained.config)
    stages.check_fits(trained, checkpoint, config, trained.num_actions)
    folders.open_run(
        workdir, stage="evaluate", config=config, checkpoint=str(checkpoint)
    )
    if _VIDEO_TASKS.value:
        _record_tasks(workdir, trained, config)
    elif names is None:
        _evaluate(workdir, trained, config, str(checkpoint))
    else:
        _evaluate_rewards(workdir, trained, config, str(checkpoint), names)
    for path in sorted(workdir.glob("*.gif")):
        print(f"Video: {path}")


def _evaluate(
    workdir: pathlib.Path,
    trained: stages.Trained,
    config: config_lib.Config,
    checkpoint: str,
) -> None:
    """Plays the full games of a fine-tuned agent, and films the first."""
    started = time.monotonic()
    with common_flags.watched() as watched:
        played = evaluation.evaluate(
            config,
            evaluation.make_player(config, trained.agent),
            trained.state,
            record_games=int(_VIDEO.value),
            constructor=reward_functions.constructor_for(
                config.finetune.reward, games.make_pool, config.observation
            ),
            **watched,
        )
    result = stages.evaluation_result(
        config, played, checkpoint=checkpoint, started=started
    )
    _write_result(workdir, trained, result)
    summary.print_results(config, {"evaluated": result})
    if _VIDEO.value:
        run_pictures.save_gif(workdir / "game.gif", played.pictures[0])


def _evaluate_rewards(
    workdir: pathlib.Path,
    trained: stages.Trained,
    config: config_lib.Config,
    checkpoint: str,
    names: list[str],
) -> None:
    """Tries a pretrained agent on several rewards, and prints a row for each."""
    started = time.monotonic()
    with common_flags.watched() as watched:
        results = zero_shot.evaluate_rewards(trained, config, names, **watched)
    rewards = [zero_shot.to_dict(result) for result in results]
    content = {
        "schema": folders.SCHEMA,
        "stage": "zero_shot",
        "game": config.game,
        "agent": config.agent,
        "seed": config.seed,
        "preset": config.preset,
        "checkpoint": checkpoint,
        "pretrain_frames": trained.step * config.observation.frame_skip,
        "protocol": evaluation.protocol_of(config),
        "rewards": rewards,
        "wall_seconds": round(time.monotonic() - started, 3),
        "device": jax.devices()[0].platform,
        "git_commit": folders.git_commit(),
    }
    _write_result(workdir, trained, content)
    summary.print_rewards(config, rewards)
    if _VIDEO.value:
        player = evaluation.make_player(config, trained.agent, adapted=True)
        clips = [
            summary.film(config, player, result.state, record_agent_steps=_CLIP_STEPS)
            for result in results
        ]
        labels = [result.name.rpartition(":")[2] for result in results]
        sheets = run_pictures.tile(clips, labels)
        run_pictures.save_gif(workdir / "rewards.gif", sheets)


def _write_result(
    workdir: pathlib.Path, trained: stages.Trained, result: dict[str, Any]
) -> None:
    """Writes a result, and the agent steps at the checkpoint that was used."""
    path = workdir / folders.RESULT_NAME
    folders.write_json(path, {**result, "checkpoint_step": trained.step})
    print(f"Result: {path}")


def _record_tasks(
    workdir: pathlib.Path, trained: stages.Trained, config: config_lib.Config
) -> None:
    """Films one game for each of some random task vectors, side by side."""
    count = _VIDEO_TASKS.value
    play = trained.agent.play_skills
    if play is None:
        raise ValueError(f"Agent {config.agent} has no task vectors to play for.")
    config = config_lib.replace_options(config, eval_episodes=count)
    with common_flags.watched() as watched:
        played = evaluation.evaluate(
            config,
            evaluation.compile_player(play, config.evaluation.eval_epsilon),
            trained.state,
            record_games=count,
            record_agent_steps=_CLIP_STEPS,
            only_record=True,
            **watched,
        )
    labels = [
        ", ".join(f"{value:+.1f}" for value in task[:6])
        for task in played.extras["task"]
    ]
    sheets = run_pictures.tile(played.pictures, labels)
    run_pictures.save_gif(workdir / "tasks.gif", sheets)


if __name__ == "__main__":
    common_flags.run(main, short=_SHORT)
