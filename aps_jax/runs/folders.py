"""A run's folder: which run it holds, its lock, and how its JSON files are written."""

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from typing import IO, Any, Self

from absl import logging
from flax import traverse_util

from aps_jax import config as config_lib

CONFIG_NAME = "config.json"
RESULT_NAME = "result.json"
LOCK_NAME = "lock"
CHECKPOINTS_NAME = "checkpoints"
SCHEMA = 1

# Where a run of several stages keeps each.
STAGE_FOLDERS = {"pretrain": "pretrain", "finetune": "pretrained"}

_UNFINISHED = ".tmp"  # appended to the name of a file while it is written

# What two starts of the same run may differ in, besides the options that are declared
# resumable: where and when it was started.
_NO_VALUES = {"schema", "run_id", "versions", "git_commit", "command"}

# Values that name another run by its path. That run's id is stored beside them.
_RUNS = ("init", "checkpoint")

# What `flock` raises on file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

# What `config.from_dict` raises for what is no config.
_NO_CONFIG = (KeyError, TypeError, AttributeError, ValueError)

PathLike = str | os.PathLike[str]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "rlax", "flashbax", "numpy", "envpool")


def as_path(text: PathLike) -> pathlib.Path:
    """Returns the path that a flag or a caller names, with `~` expanded.

    Raises:
      ValueError: It is a URL, or there is no home folder to expand.
    """
    if found := re.match(r"([a-z][a-z0-9+.-]+):/", os.fspath(text)):
        raise ValueError(
            f"{os.fspath(text)} is a URL: a run needs a folder of a mounted file "
            f"system, and {found[1]}: is not supported."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(text)}: {error}") from error


def write_json(path: PathLike, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file whole or not at all, also where the power fails."""
    path = pathlib.Path(path)
    temporary = path.with_name(path.name + _UNFINISHED)
    with temporary.open("w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      ValueError: The file is missing, unreadable or no JSON object.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if isinstance(values, dict):
        return values
    raise ValueError(f"{path} does not hold a JSON object.")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache  # Asked often, and it starts a process.
def git_commit() -> str | None:
    """Returns the commit of the source tree, marked if changed; None outside git."""
    root = pathlib.Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def open_run(
    workdir: PathLike, *, stage: str, config: config_lib.Config, **metadata: Any
) -> bool:
    """Creates the folder of a run, or finds that it holds this run.

    Args:
      workdir, stage, config: What is stored, besides versions and the command.
      **metadata: What else a later user of the folder must know, as JSON values. `init`
        and `checkpoint` are paths of other runs; they are compared by the run there.

    Returns:
      Whether the folder already held this run, which is then continued.

    Raises:
      ValueError: The folder holds another run or something else, or is a file or a URL.
    """
    workdir = as_path(workdir)
    metadata = {"stage": stage, "config": config_lib.to_dict(config), **metadata}
    for name in _RUNS:
        if metadata.get(name) is not None:
            path = pathlib.Path(metadata[name]).resolve()
            metadata |= {name: str(path), f"{name}_id": _run_id(path)}
    if holds_run(workdir, metadata):
        return True
    identity = {"schema": SCHEMA, "run_id": uuid.uuid4().hex, **metadata}
    origin = {"versions": versions(), "git_commit": git_commit(), "command": sys.argv}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / CONFIG_NAME, identity | origin)
    except OSError as error:
        raise ValueError(f"Cannot write to {workdir}: {error.strerror}.") from error
    return False


def holds_run(workdir: pathlib.Path, wanted: dict[str, Any]) -> bool:
    """Returns whether a folder holds the run whose `config.json` is as `wanted`.

    If not, it is free for one.

    Raises:
      ValueError: It holds another run or something else, or cannot be a folder.
    """
    there = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; a run needs a folder of its own.")
    path = workdir / CONFIG_NAME
    if path.exists():
        found = read_json(path)
        found = {name: found[name] for name in wanted if name in found}
        if differences := _differences(found, wanted):
            raise ValueError(
                f"{workdir} holds another run ({'; '.join(differences)}). Give another "
                "--workdir, or the same flags to continue that run."
            )
        return True
    # A start that was killed may have left this one.
    unfinished = CONFIG_NAME + _UNFINISHED
    if workdir.is_dir() and any(p.name != unfinished for p in workdir.iterdir()):
        raise ValueError(
            f"{workdir} is not empty and holds no {CONFIG_NAME}: not a run's folder. "
            "Give another --workdir."
        )
    return False


def _run_id(workdir: pathlib.Path) -> str | None:
    with contextlib.suppress(ValueError):
        return read_json(workdir / CONFIG_NAME).get("run_id")
    return None


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Returns a sentence for each value in which two descriptions of a run differ."""
    # Options that an older version did not have take their defaults.
    with contextlib.suppress(*_NO_CONFIG):
        config = config_lib.to_dict(config_lib.from_dict(found["config"]))
        found = {**found, "config": config}
    left, right = (traverse_util.flatten_dict(x, sep=".") for x in (found, wanted))
    for name in _RUNS:
        there, here = left.pop(f"{name}_id", None), right.pop(f"{name}_id", None)
        if there is not None and there == here:
            left[name] = right[name]  # Wherever that run lies now.
        elif left.get(name) is not None and left[name] == right.get(name):
            left[name] = f"an earlier run in {left[name]}"
    fields = config_lib.all_option_fields().items()
    resumable = {name for name, field in fields if field.metadata["resumable"]}
    return [
        f"{words[-1]} is {left.get(name)!r} there and {right.get(name)!r} here"
        for name in sorted(set(left) | set(right))
        if (words := name.split("."))[0] not in _NO_VALUES
        and words[-1] not in resumable
        and left.get(name) != right.get(name)
    ]


def lock_warning(folder: PathLike) -> str | None:
    """Returns a warning if the file system of a writable folder has no locks."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return _try_lock(file, folder)


def _try_lock(file: IO[Any], folder: PathLike) -> str | None:
    """Locks a file, or raises a `BlockingIOError`; returns `lock_warning`'s warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return (
            f"the file system of {folder} has no locks: nothing keeps a second process "
            "out of a run's folder."
        )
    return None


class RunLock:
    """Keeps other processes out of a run's folder; it ends with the process."""

    def __init__(
        self, workdir: PathLike, *, warn: Callable[[str], None] = logging.warning
    ):
        """Locks an existing folder, or warns that its file system has no locks.

        Raises:
          ValueError: Another process holds it, with its number.
        """
        self._workdir = pathlib.Path(workdir)
        self._warn = warn
        self._file = self._lock()
        self._identity = (self._workdir / CONFIG_NAME).read_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def ensure(self) -> bool:
        """Makes the folder anew if it was deleted, and takes it; returns if it had to.

        Raises:
          OSError: It cannot be made.
          ValueError: Another run or process has taken its place.
        """
        path = self._workdir / CONFIG_NAME
        if path.exists() and self._is_held():
            return False
        self._workdir.mkdir(parents=True, exist_ok=True)
        if not self._is_held():
            taken = self._lock()
            self._file.close()
            self._file = taken
        if not path.exists():
            write_text(path, self._identity.decode())
        elif path.read_bytes() != self._identity:
            raise ValueError(f"{self._workdir} holds another run by now.")
        return True

    def _is_held(self) -> bool:
        """Returns whether the lock file in the folder is the one that is held."""
        with contextlib.suppress(OSError):
            there = (self._workdir / LOCK_NAME).stat()
            return os.path.samestat(os.fstat(self._file.fileno()), there)
        return False

    def _lock(self) -> IO[str]:
        file = (self._workdir / LOCK_NAME).open("a+")
        try:
            if warning := _try_lock(file, self._workdir):
                self._warn(warning)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ValueError(
                f"{self._workdir} is in use by another process ({holder}). Wait for "
                "it, or give another --workdir."
            ) from error
        with contextlib.suppress(OSError):  # A full disk locks as well without a name.
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        return file


def read_run(workdir: PathLike) -> tuple[dict[str, Any], config_lib.Config]:
    """Returns all that a run's `config.json` says, and the config in it.

    Raises:
      ValueError: It is no run's folder, with what is there instead.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / CONFIG_NAME
    if not path.exists():
        there = "is a file" if workdir.exists() else "does not exist"
        if workdir.is_dir():
            names = sorted(entry.name for entry in workdir.iterdir())
            there = f"holds {', '.join(names[:8]) or 'nothing'}"
        raise ValueError(
            f"{workdir} is not a run's folder: it has no {CONFIG_NAME}; it {there}."
        )
    metadata = read_json(path)
    if metadata.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {metadata.get('schema')}, this version reads {SCHEMA}."
        )
    try:
        return metadata, config_lib.from_dict(metadata["config"])
    except _NO_CONFIG as error:
        raise ValueError(f"{path} does not hold a valid config: {error}") from error


def find_result(workdir: PathLike) -> dict[str, Any] | None:
    """Returns the `result.json` of a finished run, None before it is finished."""
    path = pathlib.Path(workdir, RESULT_NAME)
    return read_json(path) if path.exists() else None


def find_stage(workdir: PathLike, stage: str) -> pathlib.Path:
    """Returns the folder of a stage: `workdir` itself, or one inside a run of several.

    Raises:
      ValueError: There is none, with what is there instead.
    """
    workdir = pathlib.Path(workdir)
    there = read_run(workdir)[0].get("stage")
    if there == stage:
        return workdir
    inner = workdir / STAGE_FOLDERS[stage]
    if (inner / CONFIG_NAME).exists():
        return inner
    raise ValueError(
        f"{workdir} holds a run of stage {there!r}, and none of stage {stage!r}."
    )
