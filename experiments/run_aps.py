r"""Pretrains APS on one game without its reward, then fine-tunes on that reward.

  python -m experiments.run_aps --game=Breakout --preset=cpu --workdir=runs/b --seed=1

Liu & Abbeel 2021, https://arxiv.org/abs/2108.13956. Ends with the score beside random
and human scores, WORKDIR/result.json, a picture of the learning curves and a gif of the
agent playing. The same command continues a run that was interrupted.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags

from aps_jax import config as config_lib
from aps_jax import evaluation, metrics, pictures, rundir, stages
from aps_jax.interrupts import StopRequests
from aps_jax.progress import Progress
from experiments import common_flags, summary

_KNOWN_ARMS = ("pretrained", "scratch")
_STAGES = (stages.PRETRAIN, stages.FINETUNE)
_ARMS = flags.DEFINE_list(
    "arms",
    ["pretrained"],
    "Fine-tunings to run: pretrained, scratch (an untrained agent with the same "
    "budget), or both with a comma between.",
)


def main(argv: Sequence[str]) -> None:
    """Runs the stages that the flags describe."""
    common_flags.reject_words(argv)
    if not _ARMS.value or not set(_ARMS.value) <= set(_KNOWN_ARMS):
        raise ValueError(
            f"--arms must be some of {', '.join(_KNOWN_ARMS)}, got {_ARMS.value}."
        )
    config = common_flags.config_from_flags()
    workdir = common_flags.workdir_from_flags()
    if common_flags.is_preflight(config, workdir, *_STAGES):
        return
    rundir.open_run(workdir, stage="run_aps", config=config, arms=_ARMS.value)
    results: dict[str, dict[str, Any]] = {}
    with StopRequests() as stop, Progress() as progress:
        watched = {"progress": progress, "stop": stop}
        if "pretrained" in _ARMS.value:
            init = workdir / "pretrain"
            stages.pretrain(config, init, **watched)
            results["pretrained"] = stages.finetune(
                config, workdir / "pretrained", init, **watched
            )
        if "scratch" in _ARMS.value:
            results["scratch"] = stages.finetune(
                config, workdir / "scratch", None, **watched
            )
        arm = _ARMS.value[0]
        rundir.write_json(
            workdir / rundir.RESULT_NAME,
            {**results[arm], "stage": "run_aps", "arms": results},
        )
        _draw(config, workdir, list(results), **watched)
    summary.print_results(config, results)
    print(f"Result: {workdir / rundir.RESULT_NAME}")
    print(f"Learning curves: {workdir / 'curves.png'}")
    print(f"The agent playing: {workdir / 'game.gif'}")


def _draw(
    config: config_lib.Config,
    workdir: pathlib.Path,
    arms: list[str],
    *,
    progress: Progress,
    stop: StopRequests,
) -> None:
    """Writes the learning curves and a gif of the first arm's agent playing."""
    has_pretraining = "pretrained" in arms
    pictures.save_learning_curves(
        workdir / "curves.png",
        game=config.game,
        pretrain_csv=(
            workdir / "pretrain" / metrics.FILE_NAME if has_pretraining else None
        ),
        finetune_csvs={arm: workdir / arm / metrics.FILE_NAME for arm in arms},
    )
    trained = stages.load_finetuned(workdir / arms[0])
    one_game = config_lib.replace_options(config, eval_episodes=1)
    played = evaluation.evaluate(
        one_game,
        trained.agent,
        trained.state.params,
        jnp.asarray(trained.facts["inferred"]["task"], jnp.float32),
        use_gpi=False,
        record_agent_steps=summary.VIDEO_AGENT_STEPS,
        progress=progress,
        stop=stop,
    )
    pictures.save_gif(workdir / "game.gif", played.pictures)


if __name__ == "__main__":
    common_flags.run(main)
