"""A run's folder: whose it is, what it holds, and how its JSON files are written."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import IO, Any, Self

from aps_jax import config as config_lib

CONFIG_NAME = "config.json"
RESULT_NAME = "result.json"
LOCK_NAME = "lock"
CHECKPOINTS_NAME = "checkpoints"
SCHEMA = 1

_UNFINISHED = ".tmp"  # appended to the name of a file while it is written

# Where a run of several stages keeps each.
STAGE_FOLDERS = {"pretrain": "pretrain", "finetune": "pretrained"}

# What two starts of the same run may differ in: where and when it was started, and which
# checkpoints are kept, and on how many devices it runs, which changes no number of the
# run but for rounding.
_NO_VALUES = ("schema", "versions", "git_commit", "command")
_FREE = ("config.report.keep_", "config.report.checkpoint_", "config.num_devices")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "rlax", "flashbax", "numpy", "envpool")


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file whole or not at all, also where the power fails."""
    temporary = path.with_name(path.name + _UNFINISHED)
    with temporary.open("w", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
      ValueError: The file is missing, unreadable or no JSON object.
    """
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        # A wrong file is a wrong value of the caller's, not a wrong type.
        raise ValueError(f"{path} does not hold a JSON object.")  # noqa: TRY004
    return values


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
    workdir: pathlib.Path, *, stage: str, config: config_lib.Config, **facts: Any
) -> bool:
    """Makes a folder this run's own, or finds that it already is.

    Args:
      workdir: The folder; it is created if it does not exist.
      stage: Name of the stage.
      config: The run's config.
      **facts: What else a later user of the folder must know, as JSON values.

    Returns:
      Whether the folder already held this very run, which is then continued.

    Raises:
      ValueError: The folder holds another run, or something else, or is no folder.
    """
    facts = {"stage": stage, "config": config_lib.to_dict(config), **facts}
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; a run needs a folder of its own.")
    path = workdir / CONFIG_NAME
    if path.exists():
        found = read_json(path)
        differences = _differences(found, facts)
        if differences:
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
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(
            path,
            {
                "schema": SCHEMA,
                **facts,
                "versions": versions(),
                "git_commit": git_commit(),
                "command": sys.argv,
            },
        )
    except OSError as error:
        raise ValueError(f"Cannot write to {workdir}: {error.strerror}.") from error
    return False


class RunLock:
    """Keeps other processes out of a run's folder; it dies with the process."""

    def __init__(self, workdir: pathlib.Path):
        """Takes the folder, which exists.

        Raises:
          ValueError: Another process holds it, with its number.
        """
        self._workdir = workdir
        self._path = workdir / LOCK_NAME
        self._file = _lock(workdir)
        self._identity = (workdir / CONFIG_NAME).read_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info) -> None:
        self._file.close()

    def ensure(self) -> bool:
        """Makes the folder anew if it was deleted, and takes it again.

        Returns:
          Whether it had to.

        Raises:
          OSError: It cannot be made.
          ValueError: Another run or process has taken its place.
        """
        path = self._workdir / CONFIG_NAME
        if path.exists() and self._is_held():
            return False
        self._workdir.mkdir(parents=True, exist_ok=True)
        if not self._is_held():
            taken = _lock(self._workdir)
            self._file.close()
            self._file = taken
        if not path.exists():
            write_text(path, self._identity.decode())
        elif path.read_bytes() != self._identity:
            raise ValueError(f"{self._workdir} holds another run by now.")
        return True

    def _is_held(self) -> bool:
        """Returns whether the lock file in the folder is the one that is held."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except OSError:
            return False


def _lock(workdir: pathlib.Path) -> IO[str]:
    file = (workdir / LOCK_NAME).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(
            f"{workdir} is in use by another process ({holder}). Wait for it, or give "
            "another --workdir."
        ) from error
    with contextlib.suppress(OSError):  # A full disk locks as well without a name.
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
    return file


def read_run(workdir: pathlib.Path) -> tuple[dict[str, Any], config_lib.Config]:
    """Reads whose folder this is.

    Returns:
      All that `config.json` says, and the config in it.

    Raises:
      ValueError: It is no run's folder, with what is there instead.
    """
    path = workdir / CONFIG_NAME
    if not path.exists():
        if not workdir.exists():
            there = "does not exist"
        elif not workdir.is_dir():
            there = "is a file"
        else:
            names = sorted(entry.name for entry in workdir.iterdir())
            there = "holds " + (", ".join(names[:8]) if names else "nothing")
        raise ValueError(
            f"{workdir} is not a run's folder: it has no {CONFIG_NAME}; it {there}."
        )
    facts = read_json(path)
    if facts.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {facts.get('schema')}, this version reads {SCHEMA}."
        )
    try:
        return facts, config_lib.from_dict(facts["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a valid config: {error}") from error


def find_result(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns what a finished run's `result.json` holds, None before it is finished."""
    path = workdir / RESULT_NAME
    return read_json(path) if path.exists() else None


def find_stage(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Returns the folder of a stage: `workdir` itself, or one in a run of several.

    Raises:
      ValueError: There is none, with what is there instead.
    """
    facts, _ = read_run(workdir)
    if facts.get("stage") == stage:
        return workdir
    inner = workdir / STAGE_FOLDERS[stage]
    if (inner / CONFIG_NAME).exists():
        return inner
    raise ValueError(
        f"{workdir} holds a run of stage {facts.get('stage')!r}, and none of stage "
        f"{stage!r}."
    )


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Says in words where two descriptions of a run differ."""
    left, right = _flatten(found), _flatten(wanted)
    return [
        f"{name.split('.')[-1]} is {left.get(name)!r} there and {right.get(name)!r} here"
        for name in sorted(set(left) | set(right))
        if name.split(".")[0] not in _NO_VALUES
        and not name.startswith(_FREE)
        and left.get(name) != right.get(name)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
