"""What a stage measures: each metric declared once, written as CSV and TensorBoard.

docs/metrics.md is made from these declarations, by `python -m experiments.pages`.
"""

import contextlib
import csv
import itertools
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aps_jax.runs import folders
from aps_jax.types import Metric

FILE_NAME = "metrics.csv"

_FILE_NUMBERS = itertools.count()  # of the event files of this process


# The first columns of every stage's file: how far it is.
COUNTERS = (
    Metric("agent_steps", "agent steps", "Steps of all environments in this stage."),
    Metric("frames", "frames", "Agent steps times the frame skip: 4 on Atari, else 1."),
    Metric("updates", "updates", "Gradient steps made in this stage."),
    Metric("episodes", "games", "Games finished in this stage."),
    Metric(
        "episode_return",
        "points",
        "Mean over environments of the unclipped score of the last finished game; NaN "
        "until one has ended. While pretraining the agent never sees it.",
    ),
    Metric(
        "episode_length",
        "agent steps",
        "Mean over environments of the length of the last finished game.",
    ),
    Metric(
        "visited",
        "states",
        "Estimated number of states visited in this stage that differ in the game's "
        "memory (in worlds: exact up to collisions of a hash).",
    ),
)
FOLLOWING = Metric(
    "skill_following",
    "-",
    "Mean of phi^T w in fresh greedy play, minus the same with the tasks of other "
    "environments: 0 where tasks are not obeyed, 1 at best. NaN in rows without a "
    "measurement; one is made for each checkpoint.",
)

EVALUATION = (
    Metric(
        "eval_return_mean",
        "points",
        "Mean over full games of the sum of the unclipped reward: the "
        "score, unless `--reward` says otherwise.",
    ),
    Metric("eval_return_std", "points", "Standard deviation over those games."),
    Metric(
        "eval_score_mean", "points", "Mean score of those games, whatever the reward."
    ),
    Metric("eval_length_mean", "agent steps", "Mean length of those games."),
    Metric(
        "eval_human_normalized",
        "-",
        "(mean score - random) / (human - random); NaN for games without a table, or "
        "games cut before 108,000 frames.",
    ),
)


def pretrain_columns(learned: Sequence[Metric]) -> tuple[str, ...]:
    """Returns the columns of a stage without evaluations, for a learner's metrics."""
    return tuple(m.name for m in (*COUNTERS, FOLLOWING, *learned))


def finetune_columns(learned: Sequence[Metric]) -> tuple[str, ...]:
    """Returns the columns of a stage with evaluations, for a learner's metrics."""
    return tuple(m.name for m in (*COUNTERS, *learned, *EVALUATION))


class MetricsWriter:
    """Writes rows to `metrics.csv` and to TensorBoard events.

    A resumed stage keeps the rows that its checkpoint knows of and drops later ones, so
    the file is that of a run that was never interrupted. Rows that could not be written
    are kept, and written with the next.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        columns: Sequence[str],
        *,
        kept_rows: int = 0,
        wandb_run: Any = None,
    ):
        """Opens the files in an existing folder.

        Args:
          folder: The stage's folder.
          columns: Names of the columns; the first is `agent_steps`.
          kept_rows: Rows of the file on disk to keep: those a checkpoint knows of.
          wandb_run: From `tracking.start_wandb`, if rows go to W&B too.

        Raises:
          ValueError: The file on disk has other columns.
        """
        self._columns = list(columns)
        self._folder = folder
        self._path = folder / FILE_NAME
        self._wandb_run = wandb_run
        self._rows = self._read(kept_rows)  # lines, as they stand in the file
        self._size: int | None = None  # of the file, in bytes; None: to be written anew
        self._num_written = 0  # rows in that file
        self._events: _EventFile | None = None
        # Rows that were dropped came after the last that is kept, or stand at its step.
        self._purge_step = _step_of(self._rows[-1]) if self._rows else 0
        # Rows that are no events yet.
        self._pending = [r for r in self._rows if _step_of(r) == self._purge_step]
        self.sync()

    @property
    def num_rows(self) -> int:
        """Rows written so far, those of earlier processes included."""
        return len(self._rows)

    def _read(self, kept_rows: int) -> list[str]:
        if kept_rows <= 0 or not self._path.exists():
            return []
        lines = self._path.read_text().splitlines()
        if lines[:1] != [",".join(self._columns)]:
            raise ValueError(
                f"{self._path} has columns {lines[:1]}, expected {self._columns}."
            )
        # A row cut short by a crash has fewer cells; it is written again.
        commas = len(self._columns) - 1
        return [row for row in lines[1:] if row.count(",") == commas][:kept_rows]

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; a column that `row` lacks is NaN. Raises as `sync`."""
        unknown = set(row) - set(self._columns)
        if unknown:
            raise ValueError(f"No such columns: {sorted(unknown)}.")
        line = ",".join(str(row.get(name, math.nan)) for name in self._columns)
        self._rows.append(line)
        self._pending.append(line)
        self.sync()
        if self._wandb_run is not None:
            self._wandb_run.log(_known(row))  # W&B's own step never goes back.

    def sync(self) -> None:
        """Brings to disk what is not there yet; an `OSError` leaves it for later."""
        is_whole = self._path.exists() and self._path.stat().st_size == self._size
        if not is_whole:  # After a failure, or where somebody changed or deleted it.
            folders.write_text(
                self._path, _text([",".join(self._columns), *self._rows])
            )
        elif self._num_written < len(self._rows):
            self._size = None
            with self._path.open("a", newline="") as file:
                file.write(_text(self._rows[self._num_written :]))
                file.flush()
                os.fsync(file.fileno())
        self._size, self._num_written = self._path.stat().st_size, len(self._rows)
        self._write_events()

    def _write_events(self) -> None:
        """Writes the rows that are pending as events, all rows if the file is gone."""
        try:
            if self._events is None or not self._events.path.exists():
                if self._events is not None:
                    self._events.close()
                    self._purge_step, self._pending = 0, list(self._rows)
                self._events = _EventFile(self._folder, self._purge_step)
            for row in self._pending:
                cells = map(float, row.split(","))
                values = dict(zip(self._columns, cells, strict=True))
                self._events.write(_step_of(row), values)
            self._events.flush()
            self._pending = []
        except OSError:
            # A record may have been cut short: the next try is a new file with all.
            if self._events is not None:
                self._events.path.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Closes the event file, and the W&B run."""
        if self._events is not None:
            self._events.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


class _EventFile:
    """One TensorBoard file, written in the caller's thread: its errors are told.

    `tensorboardX.SummaryWriter` writes in a thread of its own, in which a full disk
    ends the thread and then blocks the caller for good, and a kill loses what `flush`
    left in its queue (`test_rows_that_could_not_be_written_come_with_the_next`, and the
    events that `tests/faults/kill_test.py` compares).
    """

    def __init__(self, folder: pathlib.Path, purge_step: int):
        """Creates a file that supersedes events of `purge_step` and later."""
        # Takes a second to import, and only runs write events.
        import tensorboardX
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # Files of one second, host and process would have one name without the last.
        place = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        name = f"events.out.tfevents.{place}.{next(_FILE_NUMBERS)}"
        # Absolute, since tensorboardX takes gs: and s3: before a path for a protocol.
        self.path = folder.absolute() / name
        self._writer = tensorboardX.RecordWriter(str(self.path))
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def _write(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())

    def write(self, step: int, row: Mapping[str, float]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in _known(row).items()
        ]
        self._write(step=step, summary=self._summary(value=values))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # It was flushed after the last row.
            self._writer.close()


def _known(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in row.items() if x is not None and not math.isnan(x)}


def _step_of(line: str) -> int:
    return int(line.partition(",")[0])


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def read_metrics(path: pathlib.Path) -> dict[str, list[float]]:
    """Reads a `metrics.csv` into columns of floats."""
    with path.open(newline="") as file:
        names, *rows = csv.reader(file)
    return {name: [float(row[i]) for row in rows] for i, name in enumerate(names)}
