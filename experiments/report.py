r"""Reports finished runs beside the published systems: tables, files and pictures.

  python -m experiments.report RUNDIR... [--out=DIR]
  python -m experiments.report --published

A RUNDIR is the folder of a run, of paired arms, or of many runs at any depth. Scores,
intervals and the protocol are explained in docs/protocol.md.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from aps_jax.report import aggregates, report, tables
from aps_jax.runs import console
from aps_jax.scores import estimates

_OUT = flags.DEFINE_string(
    "out",
    "report",
    "Folder for report.md, report.csv, report.json and the pictures; an earlier report "
    "there is replaced. Empty only prints.",
)
_PUBLISHED = flags.DEFINE_bool(
    "published", False, "Whether to report the published systems alone, without runs."
)
_SYSTEMS = flags.DEFINE_list(
    "systems",
    list(aggregates.DEFAULT_SYSTEMS),
    "Published systems to show, separated by commas, or `all`.",
)
_RESAMPLES = flags.DEFINE_integer(
    "resamples",
    10_000,
    "Bootstrap resamples behind each interval.",
    lower_bound=1,
    upper_bound=1_000_000,
)
_PICTURES = flags.DEFINE_bool("pictures", True, "Whether to draw pictures too.")
_RLIABLE = flags.DEFINE_bool(
    "rliable",
    False,
    "Whether to compute the aggregates with the rliable library too and say how far it "
    "differs.",
)


def main(argv: Sequence[str]) -> None:
    run_dirs = argv[1:]
    try:
        if bool(run_dirs) == _PUBLISHED.value:
            raise ValueError("Give folders of runs, or --published, and not both.")
        rliable = estimates.import_rliable() if _RLIABLE.value else None
        built = report.report(
            run_dirs,
            out=_OUT.value or None,
            systems=_SYSTEMS.value,
            num_resamples=_RESAMPLES.value,
            pictures=_PICTURES.value,
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    tables.show(built)
    if rliable is not None:
        for line in aggregates.check_against_rliable(built, rliable):
            print(line)
    if _OUT.value:
        print(f"Written to {_OUT.value}: report.md, report.csv, report.json, pictures.")


if __name__ == "__main__":
    console.protect()
    app.run(main)
