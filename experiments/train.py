r"""Trains an agent on a game's reward from scratch, and plays full games at the end.

  python -m experiments.train --agent=der --game=Boxing --preset=atari100k \
    --workdir=runs/der

How the talk's rivals are run (docs/value_agents.md). Every agent can learn so: it is
fine-tuning of an untrained one. Seeds run at once (--num_seeds) or one after another.
"""

from collections.abc import Sequence

from aps_jax.train import stages
from experiments import common_flags, summary

# Games in which CURL's published code weighs the contrast by 0.01.
_LIGHTER_CONTRAST = ("Boxing", "Freeway", "Pong", "PrivateEye")


def main(argv: Sequence[str]) -> None:
    """Runs what the flags describe."""
    common_flags.reject_words(argv)
    config = common_flags.config_from_flags()
    is_weighed = "auxiliary_weight" in common_flags.given_options()
    if config.agent == "curl" and config.game in _LIGHTER_CONTRAST and not is_weighed:
        weight = "--auxiliary_weight=0.01"
        print(f"Note: CURL's published code has {weight} in {config.game}.")
    all_runs = common_flags.runs_from_flags(config, common_flags.workdir_from_flags())
    if common_flags.is_preflight(all_runs, stages.FINETUNE):
        return
    with common_flags.watched() as watched:
        for runs in all_runs:
            results = stages.finetune_runs(runs, None, **watched)
            for one, result in zip(runs.configs.values(), results, strict=True):
                print(f"Seed {one.seed}:")
                summary.print_results(one, {"scratch": result})


if __name__ == "__main__":
    short = (*common_flags.SHORT, "seeds", "num_seeds")
    common_flags.run(main, short=short, is_for_several=True)
