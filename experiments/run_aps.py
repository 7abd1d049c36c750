r"""Pretrains an agent on one game without its reward, then fine-tunes on that reward.

  python -m experiments.run_aps --game=Breakout --preset=cpu --workdir=runs/b --seed=1
  python -m experiments.run_aps --game=Breakout --preset=cpu --workdir=runs/b3 \
    --arms=pretrained,scratch --seeds=0,1,2
  python -m experiments.run_aps --preset=gpu --workdir=runs/five --num_seeds=5

APS: Liu & Abbeel 2021, https://arxiv.org/abs/2108.13956. Ends with the score beside
random and human scores, WORKDIR/result.json, a picture of the learning curves and a gif
of the agent playing; with both arms, also with what pretraining gained and its interval
over seeds. The same command continues a run that was interrupted.
"""

import gc
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from aps_jax import config as config_lib
from aps_jax.envs import games, reward_functions
from aps_jax.parallel import devices, processes
from aps_jax.report import report, run_pictures, tables
from aps_jax.runs import folders, metrics, snapshots
from aps_jax.train import evaluation, stages
from experiments import common_flags, summary

_SHORT = (*common_flags.SHORT, "arms", "seeds", "num_seeds")
# What a run leaves, as it is named to people.
_LEFT = {
    "Result": folders.RESULT_NAME,
    "Learning curves": "curves.png",
    "Visited features": "features.png",
    "The agent playing": "game.gif",
}


def main(argv: Sequence[str]) -> None:
    """Runs the stages that the flags describe."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    arms = common_flags.arms_from_flags(config, ["pretrained"])
    reward_functions.load(config.finetune.task, config.observation)
    workdir = common_flags.workdir_from_flags()
    runs = common_flags.runs_from_flags(config, workdir)
    names = [stages.PRETRAIN] * ("pretrained" in arms) + [stages.FINETUNE]
    if common_flags.is_preflight(runs, *names):
        return
    devices.make_mesh(config.num_devices)  # What is refused leaves no folder behind.
    with common_flags.watched() as watched:
        if common_flags.is_at_once() and "pretrained" in arms:
            for folder, one in runs.items():
                folders.open_run(folder, stage="run_aps", config=one, arms=arms)
            stages.pretrain_seeds(
                {folder / "pretrain": _unranked(one) for folder, one in runs.items()},
                **watched,
            )
        for folder, one in runs.items():
            results = _run(one, folder, arms, **watched)
            if folder != workdir:
                print(f"Seed {one.seed}:")
            summary.print_results(one, results)
            for what, name in _LEFT.items():
                if (folder / name).exists():
                    print(f"{what}: {folder / name}")
    is_gain_known = len(arms) == 2 and config.finetune.task == "score"
    if is_gain_known and processes.is_primary():
        tables.show_gain(report.report(list(runs)))


def _run(
    config: config_lib.Config, workdir: pathlib.Path, arms: list[str], **watched: Any
) -> dict[str, dict[str, Any]]:
    """Runs all arms of one seed; returns the result of each."""
    processes.broadcast_from_primary(
        lambda: folders.open_run(workdir, stage="run_aps", config=config, arms=arms)
    )
    results: dict[str, dict[str, Any]] = {}

    def run(
        stage: Callable[..., dict[str, Any]], config: config_lib.Config, *given: Any
    ) -> dict[str, Any]:
        # Libraries that a stage is the first to import keep frames in cycles, and those
        # hold its replay: it must not be there beside the next one's.
        gc.collect()
        return stage(config, *given, **watched)

    if "pretrained" in arms:
        init = workdir / "pretrain"
        run(stages.pretrain, _unranked(config), init)
        results["pretrained"] = run(
            stages.finetune, config, workdir / "pretrained", init
        )
    if "scratch" in arms:
        results["scratch"] = run(stages.finetune, config, workdir / "scratch", None)

    def write() -> None:
        folders.write_json(
            workdir / folders.RESULT_NAME,
            {**results[arms[0]], "stage": "run_aps", "arms": results},
        )
        _draw(config, workdir, list(results), **watched)

    processes.broadcast_from_primary(write)
    return results


def _unranked(config: config_lib.Config) -> config_lib.Config:
    """Returns the config of pretraining, which must not choose by the game's score."""
    return config_lib.replace_options(config, keep_best=False)


def _draw(
    config: config_lib.Config, workdir: pathlib.Path, arms: list[str], **watched: Any
) -> None:
    """Writes the learning curves and a gif of the first arm's agent playing."""
    has_pretraining = "pretrained" in arms
    run_pictures.save_learning_curves(
        workdir / "curves.png",
        title=f"{config.agent} on {config.game}",
        reference=summary.reference_of(config),
        pretrain_csv=(
            workdir / "pretrain" / metrics.FILE_NAME if has_pretraining else None
        ),
        finetune_csvs={arm: workdir / arm / metrics.FILE_NAME for arm in arms},
    )
    if visited := snapshots.read_snapshots(workdir / "pretrain"):
        run_pictures.save_feature_picture(workdir / "features.png", visited)
    if (workdir / "game.gif").exists():
        return
    trained = stages.load_finetuned(workdir / arms[0], warn=common_flags.warn)
    played = evaluation.evaluate(
        config_lib.replace_options(config, eval_episodes=1),
        evaluation.make_player(config, trained.agent),
        trained.state,
        record_games=1,
        only_record=True,
        constructor=reward_functions.constructor_for(
            config.finetune.task, games.make_pool, config.observation
        ),
        **watched,
    )
    run_pictures.save_gif(workdir / "game.gif", played.pictures[0])


if __name__ == "__main__":
    common_flags.run(main, short=_SHORT, is_for_several=True)
