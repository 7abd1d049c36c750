r"""Measures how near to the machine's limits the project runs, and prints the ratios.

  python -m experiments.benchmark [--rows=acting,full,...] --workdir=runs/bench

Everything is compared within one process, turn by turn, and ratios are medians over the
repetitions, so that they hold on a busy machine. Writes WORKDIR/benchmark.json and
WORKDIR/benchmark.md; docs/performance.md explains the rows. Takes about twenty minutes on
two cores; `--size=smoke` runs every row in seconds and measures nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from aps_jax.runs import folders
from experiments import (
    bench_loop,
    bench_parts,
    bench_scaling,
    bench_seeds,
    bench_startup,
    bench_table,
    common_flags,
)

ROWS: Mapping[str, Callable[[bench_loop.Size], list[bench_table.Row]]] = {
    "acting": bench_loop.acting_rows,
    "full": bench_loop.full_rows,
    "raw": bench_loop.raw_rows,
    "others": bench_loop.others_rows,
    "replay": bench_parts.replay_rows,
    "recompilation": bench_loop.recompilation_rows,
    "page_faults": bench_loop.page_faults_rows,
    "knn": bench_parts.knn_rows,
    "knn_accuracy": bench_parts.accuracy_rows,
    "knn_memory": bench_parts.knn_memory_rows,
    "encoder": bench_parts.encoder_rows,
    "startup": bench_startup.startup_rows,
    "scaling": bench_loop.scaling_rows,
    "seeds": bench_seeds.seeds_rows,
    "devices": bench_scaling.devices_rows,
    "particles": bench_scaling.particles_rows,
}
_SIZES = {size.name: size for size in (bench_loop.FULL, bench_loop.SMOKE)}

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
    machine = {
        **bench_table.describe_machine(),
        "commit": folders.git_commit(),
        "size": size.name,
    }
    rows: list[bench_table.Row] = []
    for name in _ROWS.value:
        print(f"measuring {name} ...", flush=True)
        measured = ROWS[name](size)
        print(bench_table.to_text(measured), flush=True)
        rows += measured
        # After each row, so that an interrupted run keeps what it measured.
        result = {"machine": machine, "rows": [row._asdict() for row in rows]}
        (workdir / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
        (workdir / "benchmark.md").write_text(bench_table.to_markdown(rows, machine))
    bench_loop.close_sessions()
    missed = sum(row.is_met is False for row in rows)
    judged = sum(row.is_met is not None for row in rows)
    print(f"{judged - missed} of {judged} goals met; {workdir / 'benchmark.md'}")


if __name__ == "__main__":
    common_flags.run(main, short=("workdir",))
