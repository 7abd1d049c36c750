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

_OUT = flags.DEFINE_string(
    "out",
    "report",
    "Folder for report.md, report.json and the pictures; an earlier report "
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


def main(argv: Sequence[str]) -> None:
    run_dirs = argv[1:]
    try:
        if bool(run_dirs) == _PUBLISHED.value:
            raise ValueError("Give folders of runs, or --published, and not both.")
        out, systems = _OUT.value or None, _SYSTEMS.value
        built = report.report(run_dirs, out=out, systems=systems)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    tables.show(built)
    if _OUT.value:
        print(f"Written to {_OUT.value}: report.md, report.json, pictures.")


if __name__ == "__main__":
    console.protect()
    app.run(main)
