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
from collections.abc import Sequence
from typing import Any

from aps_jax import config as config_lib
from aps_jax.envs import games, reward_functions
from aps_jax.parallel import devices, processes
from aps_jax.report import report, run_pictures, tables
from aps_jax.runs import folders, metrics, snapshots
from aps_jax.train import evaluation, recorders, stages
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
    reward_functions.load(config.finetune.reward, config.observation)
    workdir = common_flags.workdir_from_flags()
    all_runs = common_flags.runs_from_flags(config, workdir)
    names = [stages.PRETRAIN] * ("pretrained" in arms) + [stages.FINETUNE]
    if common_flags.is_preflight(all_runs, *names):
        return
    devices.make_mesh(config.num_devices)  # What is refused leaves no folder behind.
    with common_flags.watched() as watched:
        for runs in all_runs:
            _run(runs, arms, **watched)
    is_gain_known = len(arms) == 2 and config.finetune.reward == "score"
    if is_gain_known and processes.is_primary():
        folders_of_seeds = [folder for runs in all_runs for folder in runs.configs]
        tables.show_gain(report.report(folders_of_seeds))


def _run(runs: recorders.Runs, arms: list[str], **watched: Any) -> None:
    """Runs all arms of one seed, or of many at once, and shows what came of each."""

    def claim() -> None:
        for folder, one in runs.configs.items():
            folders.open_run(folder, stage="run_aps", config=one, arms=arms)

    processes.broadcast_from_primary(claim)
    results: dict[str, list[dict[str, Any]]] = {}

    def of_stage(name: str, **options: Any) -> recorders.Runs:
        # Libraries that a stage is the first to import keep frames in cycles, and those
        # hold its replay: it must not be there beside the next one's.
        gc.collect()
        return recorders.Runs(
            runs.workdir / name,
            {
                folder / name: config_lib.replace_options(one, **options)
                for folder, one in runs.configs.items()
            },
        )

    if "pretrained" in arms:
        # Pretraining must not choose by the game's score.
        pretraining = of_stage("pretrain", keep_best=False)
        stages.pretrain_runs(pretraining, **watched)
        results["pretrained"] = stages.finetune_runs(
            of_stage("pretrained"), list(pretraining.configs), **watched
        )
    if "scratch" in arms:
        results["scratch"] = stages.finetune_runs(of_stage("scratch"), None, **watched)
    for place, (folder, one) in enumerate(runs.configs.items()):
        own = {arm: found[place] for arm, found in results.items()}

        def write(folder=folder, one=one, own=own) -> None:
            folders.write_json(
                folder / folders.RESULT_NAME,
                {**own[arms[0]], "stage": "run_aps", "arms": own},
            )
            _draw(one, folder, list(own), **watched)

        processes.broadcast_from_primary(write)
        if folder.name.startswith("seed_"):
            print(f"Seed {one.seed}:")
        summary.print_results(one, own)
        for what, name in _LEFT.items():
            if (folder / name).exists():
                print(f"{what}: {folder / name}")


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
    pictures = summary.film(
        config,
        evaluation.make_player(config, trained.agent),
        trained.state,
        constructor=reward_functions.constructor_for(
            config.finetune.reward, games.make_pool, config.observation
        ),
        **watched,
    )
    run_pictures.save_gif(workdir / "game.gif", pictures)


if __name__ == "__main__":
    common_flags.run(main, short=_SHORT, is_for_several=True)
