r"""Measures how near to the machine's limits the project runs, and prints the ratios.

  python -m experiments.benchmark [--rows=acting,full,...] --workdir=runs/bench

Everything is compared within one process, turn by turn, and ratios are medians over the
repetitions, so that they hold on a busy machine. Writes WORKDIR/benchmark.json and
WORKDIR/benchmark.md; docs/performance.md explains the rows. Takes about twenty minutes
on two cores; `--size=smoke` runs every row in seconds and measures nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from aps_jax.runs import folders
from experiments import common_flags
from experiments.benchmark import from_reward, loops, parts, setup, startup, table

ROWS: Mapping[str, Callable[[setup.Size], list[table.Row]]] = {
    "acting": loops.acting_rows,
    "full": loops.full_rows,
    "knn": parts.knn_rows,
    "startup": startup.startup_rows,
    "scaling": loops.scaling_rows,
    "particles": parts.particles_rows,
    "from_reward": from_reward.from_reward_rows,
}
_SIZES = {size.name: size for size in (setup.FULL, setup.SMOKE)}

_ROWS = flags.DEFINE_list("rows", list(ROWS), "Rows to measure, with commas between.")
_SIZE = flags.DEFINE_enum(
    "size", "full", list(_SIZES), "full, or smoke (seconds; its figures mean nothing)."
)


def main(argv: Sequence[str]) -> None:
    """Measures the rows that the flags name."""
    common_flags.reject_words(argv)
    unknown = [name for name in _ROWS.value if name not in ROWS]
    if unknown or not _ROWS.value:
        raise ValueError(f"--rows must be some of {', '.join(ROWS)}, got {unknown}.")
    workdir = common_flags.workdir_from_flags()
    workdir.mkdir(parents=True, exist_ok=True)
    size = _SIZES[_SIZE.value]
    machine = table.describe_machine()
    machine |= {"commit": folders.git_commit(), "size": size.name}
    rows: list[table.Row] = []
    for name in _ROWS.value:
        print(f"measuring {name} ...", flush=True)
        measured = ROWS[name](size)
        print(table.to_table(measured), flush=True)
        rows += measured
        # After each row, so that an interrupted run keeps what it measured.
        result = {"machine": machine, "rows": [row._asdict() for row in rows]}
        (workdir / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
        (workdir / "benchmark.md").write_text(table.to_markdown(rows, machine))
    setup.started.cache_clear()
    missed = sum(row.is_met is False for row in rows)
    judged = sum(row.is_met is not None for row in rows)
    print(f"{judged - missed} of {judged} goals met; {workdir / 'benchmark.md'}")
