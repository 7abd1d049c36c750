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
    all_runs = common_flags.runs_from_flags(config, workdir)
    if common_flags.is_preflight(all_runs, stages.PRETRAIN):
        return
    with common_flags.watched() as watched:
        for runs in all_runs:
            results = stages.pretrain_runs(runs, **watched)
            for folder, result in zip(runs.configs, results, strict=True):
                print(
                    f"Pretrained on {result['game']} for "
                    f"{result['pretrain_frames']:,} frames without reward.\n"
                    "Next: python -m experiments.finetune "
                    f"{shlex.quote(f'--init={folder}')} --workdir=DIR"
                )


if __name__ == "__main__":
    short = (*common_flags.SHORT, "num_seeds")
    common_flags.run(main, short=short, is_for_several=True)
