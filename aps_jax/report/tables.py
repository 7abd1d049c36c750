"""Words a report: tables for the terminal and Markdown, rows for CSV, JSON values."""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from aps_jax.report import aggregates, finished_runs
from aps_jax.scores import estimates, protocol, scores

KIND = "aps_jax report"
SCHEMA = 1

_FILE_WIDTH = 400
_GAIN_TITLE = "Did pretraining help?"
_CELL_PADDING = 3  # Between two columns in the box style that is used.


_SUMMARY_COLUMNS = (
    "mean",
    "median",
    "IQM",
    "optimality gap",
    "at or above human",
)


class Table(NamedTuple):
    """A table in words, ready for a terminal or for Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def tables(built: aggregates.Report) -> tuple[Table, ...]:
    """Words a report: the runs, the games, the aggregates, and the comparisons."""
    made = []
    if built.methods:
        made.append(_methods_table(built))
    made.append(_games_table(built))
    if built.methods:
        made.append(_summary_table(built))
        made += _comparison_tables(built)
    if {row.game for row in built.games} >= set(scores.atari26_games()):
        made.append(_printed_table(built))
    return tuple(made)


def show(built: aggregates.Report, *, width: int | None = None) -> None:
    """Prints a report to the terminal.

    Args:
      built: The report.
      width: Columns of text; None takes the terminal's, or as many as the widest table
        needs where the output is no terminal, so that nothing is cut in a file.
    """
    show_tables(tables(built), built.notices, width)


def show_gain(built: aggregates.Report, *, width: int | None = None) -> None:
    """Prints what pretraining gained over scratch, and what to know about it."""
    shown = [t for t in tables(built) if t.title in ("Comparisons", _GAIN_TITLE)]
    show_tables(shown, built.notices, width)


def show_tables(
    shown_tables: Sequence[Table], notices: Sequence[str], width: int | None = None
) -> None:
    """Prints tables and notices to the terminal; `width` as for `show`."""
    console = rich.console.Console(width=width, highlight=False)
    if width is None and not console.is_terminal:
        console.width = _FILE_WIDTH
    columns = console.width
    for table in shown_tables:
        for part in _split_columns(table, columns):
            shown = rich.table.Table(
                title=part.title, title_justify="left", box=rich.box.SIMPLE_HEAD
            )
            for index, column in enumerate(part.columns):
                shown.add_column(
                    rich.text.Text(column), justify="right" if index else "left"
                )
            for row in part.rows:
                shown.add_row(*map(rich.text.Text, row))
            console.width = max(columns, sum(_widths(part)) + _CELL_PADDING)
            console.print(shown)
            console.width = columns
            for note in part.notes:
                console.print(rich.text.Text(note, style="dim"))
    for notice in notices:
        console.print(rich.text.Text(f"Note: {notice}"))


def _split_columns(table: Table, width: int) -> list[Table]:
    """Splits a table that is too wide into parts; each begins with the first column.

    A number that is cut off reads as another number, so none ever is.
    """
    widths = _widths(table)
    parts: list[list[int]] = [[]]
    for index in range(1, len(widths)):
        used = widths[0] + sum(widths[other] for other in parts[-1])
        if parts[-1] and used + widths[index] + _CELL_PADDING > width:
            parts.append([])
        parts[-1].append(index)
    return [
        Table(
            table.title + (f" ({number} of {len(parts)})" if len(parts) > 1 else ""),
            tuple(table.columns[index] for index in (0, *part)),
            tuple(tuple(row[index] for index in (0, *part)) for row in table.rows),
            table.notes if number == len(parts) else (),
        )
        for number, part in enumerate(parts, start=1)
    ]


def _widths(table: Table) -> list[int]:
    """Returns how many columns of text each column of a table needs."""
    return [
        max(len(row[index]) for row in (table.columns, *table.rows)) + _CELL_PADDING
        for index in range(len(table.columns))
    ]


def to_markdown(built: aggregates.Report, *, pictures: Sequence[str] = ()) -> str:
    """Returns the report as Markdown, with links to `pictures` beside it."""
    lines = [
        "# Report",
        "",
        "Made by `python -m experiments.report`; nothing here is typed by hand.",
        "",
    ]
    lines += [f"- {notice}" for notice in built.notices] + [""] * bool(built.notices)
    for table in tables(built):
        lines += [f"## {table.title}", "", *markdown_table(table), ""]
        lines += [f"{note}\n" for note in table.notes]
    for name in pictures:
        lines += [f"![{pathlib.Path(name).stem.replace('_', ' ')}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def results_markdown(built: aggregates.Report) -> str:
    """Returns the tables that say what was run, what it scored and what it gained."""
    lines = []
    told: set[str] = set()
    for table in tables(built):
        if table.title in ("Methods", "Scores per game", "Comparisons", _GAIN_TITLE):
            lines += [f"**{table.title}**", "", *markdown_table(table), ""]
            lines += [f"{note}\n" for note in table.notes if note not in told]
            told.update(table.notes)
    if built.published:
        lines.append(
            f"{', '.join(built.published)} in capitals: published, with budgets and "
            "networks far beyond these (docs/protocol.md).\n"
        )
    lines += [f"- {notice}" for notice in built.notices]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(table: Table) -> list[str]:
    """Returns a table's lines of Markdown, without its title and notes."""
    return [
        "| " + " | ".join(map(_escape, table.columns)) + " |",
        "|" + " --- |" + " ---: |" * (len(table.columns) - 1),
        *("| " + " | ".join(map(_escape, row)) + " |" for row in table.rows),
    ]


def to_csv(built: aggregates.Report) -> str:
    """Returns one row per game: yardsticks, methods, and published systems.

    Columns end in their unit: `_points`, or `_hns` for the human-normalised score as a
    fraction.
    """
    systems = list(built.published_all)
    header = ["game", "random_points", "human_points"]
    parts = ("points", "low_points", "high_points", "hns", "low_hns", "high_hns")
    for method in built.methods:
        header += [f"{method.label} {part}" for part in parts]
        header += [f"{method.label} seeds", f"{method.label} interval over"]
    header += [f"{system} points" for system in systems] + ["suspect"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in built.games:
        values: list[Any] = [row.game, row.random, row.human]
        for method in built.methods:
            cell = row.cells.get(method.label)
            if cell is None:
                values += [None] * (len(parts) + 2)
                continue
            values += [*cell.score, *(cell.normalized or [None] * 3)]
            values += [cell.num_seeds, cell.interval_over]
        values += [getattr(row.published.get(one), "score", None) for one in systems]
        values.append(
            "; ".join(
                f"{system}: {cell.suspect}"
                for system, cell in row.published.items()
                if cell.suspect
            )
        )
        writer.writerow([_csv_value(value) for value in values])
    return out.getvalue()


def to_dict(built: aggregates.Report) -> dict[str, Any]:
    """Returns the report as plain values for JSON; unknown numbers are None."""
    content = {"kind": KIND, "schema": SCHEMA}
    for field in dataclasses.fields(built):
        content[field.name] = _plain(getattr(built, field.name))
    content["printed"] = _plain(scores.printed_summaries())
    return content


def _methods_table(built: aggregates.Report) -> Table:
    rows = []
    for method in built.methods:
        settings = method.settings
        counts = sorted({len(runs) for runs in method.runs.values()})
        seeds = "-".join(str(count) for count in sorted({counts[0], counts[-1]}))
        rows.append(
            (
                method.label,
                method.agent,
                method.arm,
                str(settings.get("preset")),
                "none"
                if method.arm == aggregates.SCRATCH
                else _count(settings.get("pretrain_frames")),
                _count(settings.get("finetune_agent_steps")),
                str(len(method.runs)),
                seeds,
            )
        )
    columns = (
        "method",
        "agent",
        "arm",
        "preset",
        "pretraining (frames)",
        "fine-tuning (agent steps)",
        "games",
        "seeds",
    )
    return Table("Methods", columns, tuple(rows), _protocol_notes(built))


def _protocol_notes(built: aggregates.Report) -> tuple[str, ...]:
    """Returns a line for each evaluation protocol: most often a single one."""
    having: dict[str, list[str]] = {}
    for method in built.methods:
        words = protocol.text(method.protocol)
        having.setdefault(words, []).append(method.label)
    if len(having) == 1:
        return (f"Evaluation: {next(iter(having))}.",)
    return tuple(
        f"Evaluation of {', '.join(labels)}: {words}."
        for words, labels in having.items()
    )


def _games_table(built: aggregates.Report) -> Table:
    systems = list(built.published)
    labels = [method.label for method in built.methods]
    columns = ["game", "random", "human"]
    for label in labels:
        columns += [label, f"{label} %"]
    columns += systems
    rows = []
    has_game_interval = has_suspect = False
    for row in built.games:
        words = [_game_words(row.game), _points(row.random), _points(row.human)]
        for label in labels:
            cell = row.cells.get(label)
            if cell is None:
                words += ["", ""]
                continue
            mark = "\u2020" if cell.interval_over == "games" else ""
            has_game_interval |= bool(mark)
            words.append(with_interval(cell.score, _points) + mark)
            words.append(
                "" if cell.normalized is None else _percent(cell.normalized.value)
            )
        for system in systems:
            published = row.published.get(system)
            if published is None:
                words.append("")
                continue
            has_suspect |= bool(published.suspect)
            words.append(_points(published.score) + ("?" if published.suspect else ""))
        rows.append(tuple(words))
    notes = []
    if labels:
        notes.append(
            "Points: mean over seeds of the final evaluation [95 % bootstrap interval "
            "over seeds]; %: human-normalised, 0 is random play and 100 is human."
        )
        notes += _protocol_notes(built)
    if has_game_interval:
        notes.append(
            "\u2020 One seed: the interval is over the evaluated games of one trained "
            "agent and says nothing about another seed."
        )
    if has_suspect:
        notes.append("? Printed so, but it cannot be right: see the notes.")
    return Table("Scores per game", tuple(columns), tuple(rows), tuple(notes))


def _summary_words(summary: aggregates.Summary) -> tuple[str, ...]:
    return (
        with_interval(summary.mean, _percent),
        with_interval(summary.median, _percent),
        with_interval(summary.interquartile_mean, _percent),
        with_interval(summary.optimality_gap, _percent),
        with_interval(summary.superhuman, lambda count: f"{count:.0f}"),
    )


def _summary_table(built: aggregates.Report) -> Table:
    rows = [
        (label, str(summary.num_games), *_summary_words(summary))
        for label, summary in built.summaries.items()
    ]
    for system, summary in built.published.items():
        mark = "?" if _is_suspect(built, system) else ""
        rows.append((system + mark, str(summary.num_games), *_summary_words(summary)))
    return Table(
        "Human-normalised score, percent",
        ("method", "games", *_SUMMARY_COLUMNS),
        tuple(rows),
        (
            (
                "0 is random play, 100 is human; a smaller optimality gap is better. "
                f"[95 % stratified bootstrap interval, {built.num_resamples:,} resamples]"
            ),
            *_protocol_notes(built),
            (
                "Published systems: computed from their cells on the games of these runs. "
                "They print one mean per game, so theirs have no interval and their IQM is "
                "over games, not runs."
            ),
        ),
    )


def _printed_table(built: aggregates.Report) -> Table:
    printed = scores.printed_summaries()
    rows = []
    for system, summary in built.published_all.items():
        known = printed.get(system, scores.PrintedSummary(None, None, None))
        mark = "?" if _is_suspect(built, system) else ""
        rows.append(
            (
                system + mark,
                *_summary_words(summary),
                _printed(known.mean),
                _printed(known.median),
                "" if known.superhuman is None else str(known.superhuman),
            )
        )
    columns = (
        "system",
        *_SUMMARY_COLUMNS,
        "printed mean",
        "printed median",
        "printed at or above human",
    )
    notes = (
        (
            "Computed from the published cells of the 26 Atari-100k games, in percent; "
            "beside it what the table of the APS talk prints, where that is recorded."
        ),
        "One mean per game: the IQM is over games, not runs.",
    )
    return Table("Published systems, 26 games", columns, tuple(rows), notes)


def _comparison_tables(built: aggregates.Report) -> list[Table]:
    if not built.comparisons:
        return []
    rows = []
    for item in built.comparisons:
        rows.append(
            (
                f"{item.label} over {item.baseline}",
                str(item.num_games),
                _maybe(item.probability, _share),
                _maybe(item.mean_gain, _signed_percent),
                _maybe(item.interquartile_mean_gain, _signed_percent),
            )
        )
    made = [
        Table(
            "Comparisons",
            ("", "games", "P(improvement)", "gain in mean", "gain in IQM"),
            tuple(rows),
            (
                (
                    "P(improvement): that a run of the one beats a run of the other in a "
                    "game drawn at random; 0.5 says that neither is better. Gains are "
                    "points of percent of the human-normalised score. [95 % intervals]"
                ),
            ),
        )
    ]
    arms = [
        item
        for item in built.comparisons
        if item.baseline
        in {m.label for m in built.methods if m.arm == aggregates.SCRATCH}
    ]
    gains = [
        (
            _game_words(gain.game),
            f"{item.label} over {item.baseline}",
            with_interval(gain.gain, _signed_points),
            with_interval(gain.probability, _share),
        )
        for item in arms
        for gain in item.games
    ]
    if gains:
        made.append(
            Table(
                _GAIN_TITLE,
                ("game", "", "gain (points)", "P(improvement)"),
                tuple(gains),
                (
                    (
                        "1.00 [1.00, 1.00]: every run of the one beat every run of the "
                        "other, which with few seeds is no certainty."
                    ),
                ),
            )
        )
    return made


def _is_suspect(built: aggregates.Report, system: str) -> bool:
    return any(
        system in row.published and row.published[system].suspect for row in built.games
    )


def _game_words(game: str) -> str:
    """Returns a game as EnvPool spells it, or as it was written."""
    if scores.find_reference_scores(game) is None:
        return game
    return scores.camel_case(game)


def with_interval(estimate: estimates.Estimate, word: Callable[[Any], str]) -> str:
    """Words an estimate, with its interval where there is one."""
    text = word(estimate.value)
    if np.isnan(estimate.low):
        return text
    return f"{text} [{word(estimate.low)}, {word(estimate.high)}]"


def _maybe(estimate: estimates.Estimate | None, word: Any) -> str:
    return "" if estimate is None else with_interval(estimate, word)


def _points(value: float | None) -> str:
    """Words a score: one decimal, none from 1,000 on."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.1f}"


def _signed_points(value: float) -> str:
    return ("+" if value > 0 else "") + _points(value)


def _percent(value: float) -> str:
    return f"{100.0 * value:.1f}"


def _signed_percent(value: float) -> str:
    return f"{100.0 * value:+.1f}"


def _printed(value: float | None) -> str:
    """Words a printed fraction in percent, with the decimals that were printed."""
    return "" if value is None else f"{100.0 * value:.6g}"


def _share(value: float) -> str:
    return f"{value:.2f}"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _csv_value(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else repr(float(value))
    return "" if value is None else value


def _plain(value: Any) -> Any:
    """Converts nested tuples, mappings and arrays to what JSON can hold."""
    if isinstance(value, finished_runs.FinishedRun):
        return {
            "path": str(value.path),
            "seed": value.seed,
            "returns": _plain(value.returns),
        }
    if hasattr(value, "_asdict"):
        return {name: _plain(inner) for name, inner in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
