r"""Pretrains APS on one game without its reward: the first stage alone.

  python -m experiments.pretrain --game=Pong --preset=cpu --workdir=runs/pretrain

Liu & Abbeel 2021, https://arxiv.org/abs/2108.13956. The newest checkpoint in
WORKDIR/checkpoints is what `experiments.finetune --init=WORKDIR` starts from. The same
command continues a run that was interrupted.
"""

from collections.abc import Sequence

from aps_jax import stages
from experiments import common_flags


def main(argv: Sequence[str]) -> None:
    """Runs the stage that the flags describe."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    workdir = common_flags.workdir_from_flags()
    if common_flags.is_preflight(config, workdir, stages.PRETRAIN):
        return
    with common_flags.watched() as watched:
        result = stages.pretrain(config, workdir, **watched)
    print(
        f"Pretrained on {result['game']} for {result['pretrain_frames']:,} frames "
        f"without reward.\nNext: python -m experiments.finetune --init={workdir} "
        "--workdir=DIR"
    )


if __name__ == "__main__":
    common_flags.run(main, is_for_several=True)
