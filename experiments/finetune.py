r"""Fine-tunes on a game's reward: the second stage alone, pretrained or from scratch.

  python -m experiments.finetune --init=runs/pretrain --workdir=runs/finetune
  python -m experiments.finetune --game=Pong --preset=cpu --workdir=runs/scratch

With --init the game, the network and every value come from that folder; flags that are
given change them. Without it an untrained agent has the same budget: the baseline.
With --num_seeds (at once) or --seeds (one after another) seed K starts from
INIT/seed_K.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from aps_jax.runs import folders
from aps_jax.train import recorders, stages
from experiments import common_flags, summary

_INIT = flags.DEFINE_string(
    "init", None, "Folder of a pretraining to start from; none starts from scratch."
)


def main(argv: Sequence[str]) -> None:
    """Runs the stage that the flags describe."""
    common_flags.reject_words(argv)
    workdir = common_flags.workdir_from_flags()
    seeds = common_flags.seeds_of_runs()
    first = _init_of(seeds[0] if seeds else None)
    base = folders.read_run(first)[1] if first else None
    config = common_flags.config_from_flags(base)
    all_runs = common_flags.runs_from_flags(config, workdir)
    if common_flags.is_preflight(all_runs, stages.FINETUNE):
        return
    arm = "pretrained" if _INIT.value else "scratch"
    with common_flags.watched() as watched:
        for runs in all_runs:
            found = [_init_of(seed if seeds else None) for seed in runs.seeds]
            inits = [init for init in found if init is not None] or None
            results = stages.finetune_runs(runs, inits, **watched)
            for one, result in zip(runs.configs.values(), results, strict=True):
                if seeds:
                    print(f"Seed {one.seed}:")
                summary.print_results(one, {arm: result})


def _init_of(seed: int | None) -> pathlib.Path | None:
    """Returns the pretraining that `--init` names, or that of one of its seeds."""
    if not _INIT.value:
        return None
    folder = folders.as_path(_INIT.value)
    if seed is not None:
        folder = recorders.seed_folder(folder, seed)
    return folders.find_stage(folder, stages.PRETRAIN)


if __name__ == "__main__":
    common_flags.run(main, is_for_several=True)
