r"""Pretrains an agent on one game without its reward: the first stage alone.

  python -m experiments.pretrain --game=Pong --preset=cpu --workdir=runs/pretrain
  python -m experiments.pretrain --preset=gpu --workdir=runs/five --num_seeds=5

APS: Liu & Abbeel 2021, https://arxiv.org/abs/2108.13956. The newest checkpoint in
WORKDIR/checkpoints is what `experiments.finetune --init=WORKDIR` starts from; with
--num_seeds each seed has such a folder, WORKDIR/seed_K. The same command continues a
run that was interrupted.
"""

import shlex
from collections.abc import Sequence

from aps_jax.train import stages
from experiments import common_flags


def main(argv: Sequence[str]) -> None:
    """Runs the stage that the flags describe."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    workdir = common_flags.workdir_from_flags()
    runs = common_flags.runs_from_flags(config, workdir)
    if common_flags.is_preflight(runs, stages.PRETRAIN):
        return
    with common_flags.watched() as watched:
        if common_flags.is_at_once():
            results = stages.pretrain_seeds(runs, **watched)
        else:
            results = [
                stages.pretrain(one, folder, **watched) for folder, one in runs.items()
            ]
    for folder, result in zip(runs, results, strict=True):
        print(
            f"Pretrained on {result['game']} for {result['pretrain_frames']:,} frames "
            "without reward.\nNext: python -m experiments.finetune "
            f"{shlex.quote(f'--init={folder}')} --workdir=DIR"
        )


if __name__ == "__main__":
    short = (*common_flags.SHORT, "num_seeds")
    common_flags.run(main, short=short, is_for_several=True)
