r"""Fine-tunes on a game's reward: the second stage alone, pretrained or from scratch.

  python -m experiments.finetune --init=runs/pretrain --workdir=runs/finetune
  python -m experiments.finetune --game=Pong --preset=cpu --workdir=runs/scratch

With --init the game, the network and every value come from that folder; flags that are
given change them. Without it an untrained agent has the same budget: the baseline.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from aps_jax import rundir, stages
from experiments import common_flags, summary

_INIT = flags.DEFINE_string(
    "init", None, "Folder of a pretraining to start from; none starts from scratch."
)


def main(argv: Sequence[str]) -> None:
    """Runs the stage that the flags describe."""
    common_flags.reject_words(argv)
    workdir = common_flags.workdir_from_flags()
    init, base = None, None
    if _INIT.value:
        init = rundir.find_stage(pathlib.Path(_INIT.value), stages.PRETRAIN)
        _, base = rundir.read_run(init)
    config = common_flags.config_from_flags(base)
    if common_flags.is_preflight(config, workdir, stages.FINETUNE):
        return
    with common_flags.watched() as watched:
        result = stages.finetune(config, workdir, init, **watched)
    summary.print_results(config, {_arm(init): result})


def _arm(init: pathlib.Path | None) -> str:
    return "scratch" if init is None else "pretrained"


if __name__ == "__main__":
    common_flags.run(main, is_for_several=True)
