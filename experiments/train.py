r"""Trains an agent on a game's reward from scratch, and plays full games at the end.

  python -m experiments.train --agent=der --game=Boxing --preset=atari100k \
    --workdir=runs/der

How the talk's rivals are run (docs/value_agents.md). Every agent can learn so: it is
fine-tuning of an untrained one. With --seeds one seed is run after another.
"""

from collections.abc import Sequence

from aps_jax.train import stages
from experiments import common_flags, summary


def main(argv: Sequence[str]) -> None:
    """Runs what the flags describe."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    runs = common_flags.runs_from_flags(config, common_flags.workdir_from_flags())
    if common_flags.is_preflight(runs, stages.FINETUNE):
        return
    with common_flags.watched() as watched:
        for folder, one in runs.items():
            result = stages.finetune(one, folder, None, **watched)
            if len(runs) > 1:
                print(f"Seed {one.seed}:")
            summary.print_results(one, {"scratch": result})


if __name__ == "__main__":
    short = (*common_flags.SHORT, "seeds")
    common_flags.run(main, short=short, is_for_several=True)
