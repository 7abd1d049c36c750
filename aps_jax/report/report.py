"""Reads finished runs and writes what they show: `experiments.report` as a function."""

import contextlib
import json
import os
import pathlib
from collections.abc import Sequence

from aps_jax.report import aggregates, finished_runs, tables

_FILES = ("report.json", "report.md")


def report(
    run_dirs: Sequence[str | os.PathLike] = (),
    *,
    out: str | os.PathLike | None = None,
    systems: Sequence[str] = aggregates.DEFAULT_SYSTEMS,
    num_resamples: int = 10_000,
) -> aggregates.Report:
    """Reads finished runs, computes every table, and writes them to a folder.

    Args:
      run_dirs: Folders of single runs, of paired arms, or of many runs at any depth;
        none reports the published systems alone.
      out: Folder for `report.md`, `report.json` and the pictures; None
        writes nothing. An earlier report there is replaced, anything else is not.
      systems: Published systems to show beside the runs; `("all",)` for every one.
      num_resamples: Bootstrap resamples behind each interval.

    Returns:
      The report.

    Raises:
      ValueError: A folder or system does not exist, no run is finished, or `out` holds
        something that is not a report.
    """
    systems = aggregates.named_systems(systems)
    folder = None if out is None else pathlib.Path(out)
    if folder is not None:
        _check_out(folder)
    built = aggregates.build(
        finished_runs.collect(run_dirs) if run_dirs else None,
        systems=systems,
        num_resamples=num_resamples,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        # Matplotlib takes a second to import and is needed for nothing else.
        from aps_jax.report import figures

        drawn = figures.draw_all(built, folder)
        content = json.dumps(tables.to_dict(built), indent=1, allow_nan=False)
        markdown = tables.to_markdown(built, pictures=[path.name for path in drawn])
        texts = (content + "\n", markdown)
        for name, text in zip(_FILES, texts, strict=True):
            (folder / name).write_text(text, encoding="utf-8")
    return built


def _check_out(out: pathlib.Path) -> None:
    """Refuses a folder in which a report would replace something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder.")
    if not any((out / name).exists() for name in _FILES):
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        content = json.loads((out / _FILES[0]).read_text(encoding="utf-8"))
        if content.get("kind") == tables.KIND:
            return
    what = "report files that are not from this program"
    raise ValueError(f"{out} holds {what}; choose another folder.")
