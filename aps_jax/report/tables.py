"""Formats a report: tables for the terminal and Markdown, values for JSON."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from aps_jax.report import aggregates, finished_runs, published
from aps_jax.scores import estimates, protocol, scores

KIND = "aps_jax report"
SCHEMA = 1

_GAINS = ("Comparisons", "Did pretraining help?")
_POINTS_NOTE = (
    "Points: mean over seeds of the final evaluation [95 % bootstrap interval over "
    "seeds]; %: human-normalised, 0 is random play and 100 is human."
)
_IMPROVEMENT_NOTE = (
    "P(improvement): that a run of the one beats a run of the other in a game drawn at "
    "random; 0.5 says that neither is better. Gains are points of percent of the "
    "human-normalised score. [95 % intervals]"
)
_CERTAIN_NOTE = (
    "1.00 [1.00, 1.00]: every run of the one beat every run of the other, which with "
    "few seeds is no certainty."
)


class Table(NamedTuple):
    """A formatted table, ready for a terminal or for Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def make_table(title: str, rows: Iterable[Mapping[str, str]], *notes: str) -> Table:
    """Makes a table of at least one row, each a mapping from columns to cells."""
    rows = list(rows)
    return Table(title, tuple(rows[0]), tuple(tuple(r.values()) for r in rows), notes)


def tables(built: aggregates.Report) -> list[Table]:
    """Formats a report: the runs, the games, the aggregates, and the comparisons."""
    known = published.rows(built.methods)
    return [
        *([_methods_table(built)] if built.methods else []),
        _games_table(built),
        *([make_table(published.TITLE, known, published.NOTE)] if known else []),
        *([_summary_table(built)] if built.summaries or built.published else []),
        *(_comparison_tables(built) if built.comparisons else []),
    ]


def show(built: aggregates.Report) -> None:
    """Prints a report."""
    show_tables(tables(built), built.notices)


def show_gain(built: aggregates.Report) -> None:
    """Prints what pretraining gained over scratch, and what to know about it."""
    show_tables([t for t in tables(built) if t.title in _GAINS], built.notices)


def show_tables(shown: Sequence[Table], notices: Sequence[str] = ()) -> None:
    """Prints tables and notices; a number is never cut, whatever the terminal."""
    for table in shown:
        columns = zip(table.columns, *table.rows, strict=True)
        widths = [max(map(len, column)) for column in columns]
        rule = tuple("-" * width for width in widths)
        print(f"\n{table.title}\n")
        for first, *others in (table.columns, rule, *table.rows):
            cells = map(str.rjust, others, widths[1:])
            print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        print("", *table.notes, sep="\n")
    for notice in notices:
        print(f"Note: {notice}")


def to_markdown(built: aggregates.Report, *, pictures: Sequence[str] = ()) -> str:
    """Returns the report as Markdown, with links to `pictures` beside it."""
    made = "Made by `python -m experiments.report`; nothing here is typed by hand."
    lines = ["# Report", "", made, ""]
    lines += [f"- {notice}" for notice in built.notices] + [""] * bool(built.notices)
    for table in tables(built):
        lines += table_lines(table, "## {}")
    for name in pictures:
        lines += [f"![{pathlib.Path(name).stem.replace('_', ' ')}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def table_lines(table: Table, heading: str) -> list[str]:
    """Returns a table as lines of Markdown, with its title in `heading`."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + " --- |" + " ---: |" * (len(table.columns) - 1)
    lines = [heading.format(table.title), "", line(table.columns), rule]
    return [*lines, *map(line, table.rows), "", *(f"{note}\n" for note in table.notes)]


def to_dict(built: aggregates.Report) -> dict[str, Any]:
    """Returns the report as plain values for JSON; unknown numbers are None."""
    fields = dataclasses.fields(built)
    return {
        "kind": KIND,
        "schema": SCHEMA,
        **{field.name: _plain(getattr(built, field.name)) for field in fields},
    }


def _plain(value: Any) -> Any:
    """Converts nested tuples, mappings and arrays to what JSON can hold."""
    if isinstance(value, finished_runs.FinishedRun):
        names = ("path", "seed", "returns")
        return {name: _plain(getattr(value, name)) for name in names}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    if isinstance(value, pathlib.Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _methods_table(built: aggregates.Report) -> Table:
    rows = []
    for method in built.methods:
        values = [method.settings.get(name) for name in finished_runs.BUDGETS]
        frames, steps = ("-" if value is None else f"{value:,}" for value in values)
        counts = [len(runs) for runs in method.runs.values()]
        rows.append(
            {
                "method": method.label,
                "preset": str(method.settings.get("preset")),
                "pretraining (frames)": frames,
                "fine-tuning (agent steps)": steps,
                "games": str(len(counts)),
                "seeds": "-".join(map(str, sorted({min(counts), max(counts)}))),
            }
        )
    return make_table("Methods", rows, *_protocol_notes(built))


def _protocol_notes(built: aggregates.Report) -> tuple[str, ...]:
    """Returns a line for each evaluation protocol: most often a single one."""
    having: dict[str, list[str]] = {}
    for method in built.methods:
        having.setdefault(protocol.text(method.protocol), []).append(method.label)
    if len(having) == 1:
        return (f"Evaluation: {next(iter(having))}.",)
    return tuple(
        f"Evaluation of {', '.join(labels)}: {text}." for text, labels in having.items()
    )


def _games_table(built: aggregates.Report) -> Table:
    labels = [method.label for method in built.methods]
    rows = []
    for row in built.games:
        line = [game_name(row.game), *map(format_points, (row.random, row.human))]
        for label in labels:
            cell = row.cells.get(label)
            if cell is None:
                line += ["", ""]
                continue
            line.append(format_estimate(cell.score, format_points))
            line.append(_percent(cell.normalized.value) if cell.normalized else "-")
        for system in built.published:
            published = row.published.get(system)
            mark = "?" if published is not None and published.suspect else ""
            line.append(format_points(published and published.score) + mark)
        rows.append(tuple(line))
    notes: list[str] = []
    if labels:
        notes = [_POINTS_NOTE, *_protocol_notes(built)]
    if any(cell.endswith("?") for line in rows for cell in line):
        notes.append("? Printed so, but it cannot be right: see the notes.")
    columns = ["game", "random", "human"]
    columns += [name for label in labels for name in (label, f"{label} %")]
    return Table(
        "Scores per game", (*columns, *built.published), tuple(rows), tuple(notes)
    )


def _format_summary(summary: aggregates.Summary) -> dict[str, str]:
    names = ("mean", "median", "IQM", "optimality gap")
    cells = (format_estimate(estimate, _percent) for estimate in summary[1:5])
    superhuman = format_estimate(summary.superhuman_count, "{:.0f}".format)
    return {**dict(zip(names, cells, strict=True)), "at or above human": superhuman}


def marked(built: aggregates.Report, system: str) -> str:
    """Returns a published system's name, marked if some cell cannot be right."""
    cells = [row.published[system] for row in built.games if system in row.published]
    return system + ("?" if any(cell.suspect for cell in cells) else "")


def _summary_table(built: aggregates.Report) -> Table:
    published = {marked(built, one): built.published[one] for one in built.published}
    rows = (
        {"method": name, "games": str(one.num_games), **_format_summary(one)}
        for name, one in (*built.summaries.items(), *published.items())
    )
    return make_table(
        "Human-normalised score, percent",
        rows,
        "0 is random play, 100 is human; a smaller optimality gap is better. [95 % "
        "stratified bootstrap interval]",
        *_protocol_notes(built),
        "Published systems: computed from their cells on these games. They "
        "print one mean per game, so theirs have no interval and their IQM is over "
        "games, not runs.",
    )


def _comparison_tables(built: aggregates.Report) -> list[Table]:
    comparisons, gains = [], []
    scratch = {m.label for m in built.methods if m.arm == aggregates.SCRATCH}
    share = "{:.2f}".format
    for item in built.comparisons:
        name = f"{item.label} over {item.baseline}"
        gain_in_iqm = item.interquartile_mean_gain
        comparisons.append(
            {
                "": name,
                "games": str(item.num_games),
                "P(improvement)": format_estimate(item.probability, share),
                "gain in mean": format_estimate(item.mean_gain, _signed(_percent)),
                "gain in IQM": format_estimate(gain_in_iqm, _signed(_percent)),
            }
        )
        gains += [
            {
                "game": game_name(one.game),
                "": name,
                "gain (points)": format_estimate(one.gain, _signed(format_points)),
                "P(improvement)": format_estimate(one.probability, share),
            }
            for one in item.games
            if item.baseline in scratch
        ]
    made = [make_table(_GAINS[0], comparisons, _IMPROVEMENT_NOTE)]
    if gains:
        made.append(make_table(_GAINS[1], gains, _CERTAIN_NOTE))
    return made


def game_name(game: str) -> str:
    """Returns a game as EnvPool spells it, or as it was written."""
    if scores.find_reference_scores(game) is None:
        return game
    return scores.camel_case(game)


def format_estimate(
    estimate: estimates.Estimate | None, format_value: Callable[[Any], str]
) -> str:
    """Formats an estimate, with its interval where there is one."""
    if estimate is None:
        return "-"
    text, low, high = map(format_value, estimate)
    return text if np.isnan(estimate.low) else f"{text} [{low}, {high}]"


def format_points(value: float | None) -> str:
    """Formats a score: one decimal, none from 1,000 on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.1f}"


def _percent(fraction: float | np.ndarray) -> str:
    return f"{100.0 * fraction:.1f}"


def _signed(format_value: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: ("+" if value > 0 else "") + format_value(value)
