"""Starts real processes of a run, kills them, and compares what they leave."""

import csv
import json
import os
import pathlib
import signal
import time

import forks
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX.proto.event_pb2

from aps_jax.parallel import interrupts
from aps_jax.runs import checkpoints

EXIT_CODE = interrupts.EXIT_CODE
STAGES = ("pretrain", "finetune")
_SECONDS = 600.0  # after which a process is taken for hanging


def _run(*arguments):
    from faults import driver  # In the child, where it is imported already.

    driver.run(*arguments)


class Process:
    """One process of a run, whose progress can be watched."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step_seconds: float = 0.0,
        full_between: tuple[int, ...] = (),
        **options,
    ):
        """Starts it; the arguments are those of `driver.run`."""
        self.workdir = workdir
        self._sends = forks.server("faults.driver").Value("i", 0)
        self._process = forks.server("faults.driver").Process(
            target=_run,
            args=(str(workdir), self._sends, step_seconds, full_between, options),
        )
        self._process.start()

    @property
    def sends(self) -> int:
        """Steps of the environments so far, evaluations included."""
        return self._sends.value

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    @property
    def log(self) -> str:
        """All that the processes of this folder have said."""
        path = pathlib.Path(f"{self.workdir}.log")
        return path.read_text() if path.exists() else ""

    def wait_for(self, condition) -> bool:
        """Waits until `condition()`, or the end; returns whether it came true."""
        deadline = time.monotonic() + _SECONDS
        while self.is_alive:
            if condition():
                return True
            assert time.monotonic() < deadline, self.log
            time.sleep(0.001)
        return condition()

    def is_saving(self) -> bool:
        """Whether a checkpoint is half written right now."""
        return any(
            next((self.workdir / stage / "checkpoints").glob("*-tmp"), None)
            for stage in STAGES
        )

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        if self.is_alive:
            os.kill(self._process.pid, number)

    def end(self) -> int:
        """Waits for the end; returns the exit code, negative for a signal."""
        self._process.join(_SECONDS)
        assert not self.is_alive, self.log
        return self._process.exitcode

    def kill(self) -> bool:
        """Kills it as `kill -9` does; returns whether it was still running."""
        self.send(signal.SIGKILL)
        return self.end() == -signal.SIGKILL


def finish(workdir: pathlib.Path, **options) -> str:
    """Runs to the end; returns what was said."""
    process = Process(workdir, **options)
    assert process.end() == 0, process.log
    return process.log


def read_checkpoint(path: pathlib.Path) -> dict:
    """Reads all arrays and metadata of a checkpoint, without any template."""
    items = {}
    for folder in sorted(path.iterdir()):
        if folder.is_dir():
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                arrays = reader.restore(folder, args=ocp.args.StandardRestore())
            items[folder.name] = jax.device_get(arrays)
    metadata = checkpoints.read_metadata(path)
    for name in ("git_commit", "config"):  # The policy, which may differ.
        del metadata[name]
    return {**items, "metadata": metadata}


def assert_equal(left, right, place="") -> None:
    """Compares nested dictionaries and lists of arrays bit for bit."""
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for name in left:
            assert_equal(left[name], right[name], f"{place}/{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal(*pair, f"{place}/{index}")
    elif isinstance(left, np.ndarray | np.generic):
        assert left.dtype == right.dtype, place
        np.testing.assert_array_equal(left, right, err_msg=place)
    else:
        assert left == right, place


def steps(stage: pathlib.Path) -> list[int]:
    """Returns the steps of the whole checkpoints of a stage."""
    return checkpoints.Checkpointer(stage / "checkpoints").steps()


def assert_on_the_way(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Checks that a killed run's newest checkpoint and its rows are the whole run's."""
    for stage in STAGES:
        found = steps(workdir / stage)
        if found:
            here = workdir / stage / "checkpoints" / str(found[-1])
            there = whole / stage / "checkpoints" / str(found[-1])
            assert_equal(read_checkpoint(here), read_checkpoint(there), f"{here}")
        rows, all_rows = read_rows(workdir / stage), read_rows(whole / stage)
        assert rows == all_rows[: len(rows)]


def assert_same_end(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Checks that a run ended as one that was never killed."""
    assert_on_the_way(workdir, whole)
    for stage in STAGES:
        assert steps(workdir / stage)[-1] == steps(whole / stage)[-1]
        here, there = (root / stage for root in (workdir, whole))
        assert (here / "metrics.csv").read_bytes() == (
            there / "metrics.csv"
        ).read_bytes()
        assert_equal(read_events(here), read_events(there), f"{here}/events")
        assert_equal(read_result(here, workdir), read_result(there, whole), f"{here}")
        assert all(p.name.isdecimal() for p in (here / "checkpoints").iterdir())


def read_rows(stage: pathlib.Path) -> list[list[str]]:
    """Reads the whole rows of `metrics.csv`; none before there is a file."""
    path = stage / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    # The last row may be cut short in a process that was killed.
    return [row for row in rows if len(row) == len(rows[0])]


def read_result(stage: pathlib.Path, workdir: pathlib.Path) -> dict:
    """Reads `result.json` but for the clock, with paths relative to the run."""
    result = json.loads((stage / "result.json").read_text())
    for name in ("wall_seconds", "frames_per_second", "git_commit"):
        del result[name]
    return {
        name: value.replace(str(workdir), "") if isinstance(value, str) else value
        for name, value in result.items()
    }


def read_events(stage: pathlib.Path) -> dict:
    """Reads scalars as TensorBoard shows them: tag to (step, value), in order.

    A file's start event takes back what earlier files hold of its step and later ones.
    """
    shown = []
    paths = stage.glob("events.out.tfevents.*")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place + 12 <= len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            record = data[place + 12 : place + 12 + size]
            place += size + 16
            event = tensorboardX.proto.event_pb2.Event.FromString(record)
            if event.HasField("session_log"):
                shown = [s for s in shown if s[1] < event.step]
            for value in event.summary.value:
                shown.append((value.tag, event.step, value.simple_value))
    return {
        tag: [[step, value] for name, step, value in shown if name == tag]
        for tag in sorted({name for name, _, _ in shown})
    }
