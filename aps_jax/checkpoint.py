"""Checkpoints: written whole in the background, verified before they are restored.

A checkpoint is a folder named by its number: a subfolder of arrays per part, written by
Orbax; `facts.json`; and `manifest.sha256`, the checksum of every other file as `sha256sum
--check` reads it. It is written under another name and renamed last, so that a number
always names a whole one. No pickle anywhere: arrays and JSON alone, so that a stranger's
checkpoint cannot run code.
"""

import concurrent.futures
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

FORMAT = 2
FACTS_NAME = "facts.json"
MANIFEST_NAME = "manifest.sha256"

# Prefixes of folders that are no checkpoints: not yet, or not any more.
_WRITING = "writing_"
_DELETING = "deleting_"
# A whole one that another of its number takes the place of.
_REPLACED = "replaced_"


class _MisfitError(ValueError):
    """A checkpoint is whole, and not what the program expects."""


class Policy(NamedTuple):
    """Which checkpoints stay on disk once a newer one is whole."""

    keep_last: int = 2  # newest
    keep_every: int = 0  # the first at or after each multiple of this; 0 for none
    keep_best: bool = False  # the one of the highest score


_DEFAULT_POLICY = Policy()


class Checkpointer:
    """Saves and restores the state of one stage in one folder.

    A checkpoint has parts: `agent`, what is learned and what a later stage takes over;
    and whatever else the stage names, each a pytree of arrays; besides `facts`, plain
    JSON values.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        policy: Policy = _DEFAULT_POLICY,
        warn: Callable[[str], None] = logging.warning,
    ):
        """Opens a folder, which is created by the first save.

        Args:
          folder: Where the checkpoints are.
          policy: Which of them stay.
          warn: Is told of damaged checkpoints.

        Raises:
          ValueError: The path exists and is no folder.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, not a folder of checkpoints.")
        self._folder = folder.resolve()
        self._policy = policy
        self._warn = warn
        # One for all saves: each has threads of its own.
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def numbers(self) -> list[int]:
        """Returns the numbers of the whole checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdecimal())

    def save(
        self, number: int, parts: Mapping[str, Any], facts: dict[str, Any]
    ) -> None:
        """Begins to save; training may go on, for the arrays are copied first.

        Waits for the save before it, if that is still under way.

        Args:
          number: Name of the checkpoint; a larger number is a newer one.
          parts: Pytrees of arrays by name of the part.
          facts: JSON values; `score`, if there and not None, is what `keep_best` ranks.

        Raises:
          OSError: The save before this one failed. This one has begun none the less.
          ValueError: `facts` are no JSON.
        """
        text = json.dumps({"format": FORMAT, **facts}, indent=1, allow_nan=False)
        failure = self._wait()
        copied = {name: _copy_to_host(part) for name, part in parts.items()}
        self._saving = self._thread.submit(self._write, number, copied, text)
        if failure is not None:
            raise failure

    def delete(self, numbers: Sequence[int]) -> None:
        """Deletes checkpoints that a run goes back behind; none may be under way."""
        for number in sorted(numbers, reverse=True):
            self._delete(number)

    def failure(self) -> OSError | None:
        """Returns why the last save failed, once; None if it did not, or is under way."""
        if self._saving is None or not self._saving.done():
            return None
        return self._wait()

    def finish(self) -> None:
        """Waits until the save under way is on disk.

        Raises:
          OSError: It failed; the checkpoints before it are as they were.
        """
        failure = self._wait()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits for the save under way, and ends the thread; a failure is a warning."""
        failure = self._wait()
        if failure is not None:
            self._warn(str(failure))
        self._thread.shutdown()
        self._orbax.close()

    def clean(self) -> None:
        """Tidies up what a process that died left half done; for the owner alone."""
        if not self._folder.is_dir():
            return
        for path in list(self._folder.iterdir()):
            if path.name.startswith(_REPLACED):
                current = self._folder / path.name.removeprefix(_REPLACED)
                if not current.exists():
                    path.rename(current)
                    continue
            if path.name.startswith((_WRITING, _DELETING, _REPLACED)):
                shutil.rmtree(path, ignore_errors=True)

    def restore_newest(
        self,
        templates: Mapping[str, Any],
        *,
        optional: tuple[str, ...] = (),
        set_damaged_aside: bool = False,
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Restores the newest checkpoint whose every file is as it was written.

        Damaged ones are passed over with a warning that names the file.

        Args:
          templates: What to restore: part to a pytree of arrays, or of
            `jax.ShapeDtypeStruct`, of the same structure.
          optional: Parts that a checkpoint may lack; what is returned lacks them too.
          set_damaged_aside: Whether to rename damaged ones, so that their numbers are
            free for a run that passes them again.

        Returns:
          The facts and the parts, sharded as the templates, or where those do not say
          on the first device; None if there is nothing.

        Raises:
          ValueError: Structure, shapes, dtypes or the format differ (the message shows
            both sides), or there are checkpoints and none of them can be read.
        """
        numbers = self.numbers()[::-1]
        damaged: list[pathlib.Path] = []
        found = None
        for number in numbers:
            path = self._folder / str(number)
            try:
                found = _restore(path, templates, optional)
                break
            except _MisfitError:
                raise
            # Orbax and TensorStore raise errors of many types for damaged files.
            except Exception as error:  # noqa: BLE001
                reason = str(error).splitlines()[0] if str(error) else repr(error)
                self._warn(
                    f"{path} cannot be read ({reason}); falling back to the one before."
                )
                damaged.append(path)
        if numbers and found is None:
            raise ValueError(f"None of the checkpoints in {self._folder} can be read.")
        if set_damaged_aside:
            for path in damaged:
                path.rename(_free_name(self._folder.parent, path.name))
        return found

    def _wait(self) -> OSError | None:
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        error = saving.exception()
        if error is None or isinstance(error, OSError):
            return error
        # TensorStore reports a full disk as a ValueError of its own.
        failure = OSError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        failure.__cause__ = error
        return failure

    def _write(self, number: int, parts: dict[str, Any], facts: str) -> None:
        """Writes a checkpoint and then applies the policy; runs in the thread."""
        temporary = self._folder / f"{_WRITING}{number}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.clean()
            self._check_room()
            temporary.mkdir()
            for name, part in parts.items():
                self._orbax.save(temporary / name, args=ocp.args.StandardSave(part))
            (temporary / FACTS_NAME).write_text(facts)
            (temporary / MANIFEST_NAME).write_text(_manifest(temporary))
            for path in [temporary, *temporary.rglob("*")]:
                _to_disk(path)
            # The number is taken where a score came later, or a run goes back.
            path = self._folder / str(number)
            replaced = self._folder / f"{_REPLACED}{number}"
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
            _to_disk(self._folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self._superseded():
            self._delete(old)

    def _check_room(self) -> None:
        """Refuses early what Orbax would refuse late, with a page of its own errors."""
        needed = 0
        for number in self.numbers()[-1:]:
            files = (self._folder / str(number)).rglob("*")
            needed = sum(path.stat().st_size for path in files if path.is_file())
        if shutil.disk_usage(self._folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def _superseded(self) -> list[int]:
        """Returns the checkpoints that the policy does not keep."""
        numbers = self.numbers()
        kept = set(numbers[-self._policy.keep_last :])
        if self._policy.keep_every:
            # The first of each interval, so that the choice never changes later.
            intervals = [number // self._policy.keep_every for number in numbers]
            kept |= {
                number
                for number, interval in zip(numbers, intervals, strict=True)
                if interval > 0 and numbers[intervals.index(interval)] == number
            }
        if self._policy.keep_best:
            scores = {number: self._score(number) for number in numbers}
            known = [n for n in numbers if scores[n] is not None]
            kept |= set(sorted(known, key=lambda n: (scores[n], n))[-1:])
        return [number for number in numbers if number not in kept]

    def _score(self, number: int) -> float | None:
        try:
            return read_facts(self._folder / str(number)).get("score")
        except (OSError, ValueError):
            return None

    def _delete(self, number: int) -> None:
        """Deletes a checkpoint, which is never seen in part."""
        path = self._folder / str(number)
        if path.exists():
            doomed = self._folder / f"{_DELETING}{number}"
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def read_facts(path: pathlib.Path) -> dict[str, Any]:
    """Returns the facts of one checkpoint, unverified.

    Raises:
      OSError: They cannot be read.
      ValueError: They are no JSON.
    """
    return json.loads((path / FACTS_NAME).read_text())


def _copy_to_host(tree: Any) -> Any:
    """Copies arrays to the host's own memory.

    On a CPU `asarray` returns a view of an array that is donated to the next step. What is
    written must not depend on whether XLA then notices the view and copies.
    """

    def copy(x: Any) -> np.ndarray:
        is_elsewhere = (
            isinstance(x, jax.Array) and next(iter(x.devices())).platform != "cpu"
        )
        return np.asarray(x) if is_elsewhere else np.array(x)

    return jax.tree.map(copy, tree)


def _manifest(folder: pathlib.Path) -> str:
    """Returns a line per file of a checkpoint: its SHA-256 and its path."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {name}\n")
    return "".join(lines)


def _verify(folder: pathlib.Path) -> None:
    """Checks that every file of a checkpoint is as it was written.

    Raises:
      ValueError: One is not, with its name.
    """
    try:
        written = (folder / MANIFEST_NAME).read_bytes().decode()
    except FileNotFoundError as error:
        raise ValueError(f"it has no {MANIFEST_NAME}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{MANIFEST_NAME} is damaged") from error
    found = _manifest(folder)
    if found == written:
        return
    names = {line[66:] for line in set(written.split("\n")) ^ set(found.split("\n"))}
    real = sorted(name for name in names if (folder / name).is_file())
    raise ValueError(
        f"{', '.join(real or sorted(names))} and {MANIFEST_NAME} do not fit together"
    )


def _to_disk(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(folder: pathlib.Path, number: str) -> pathlib.Path:
    names = [f"damaged_checkpoint_{number}"]
    while (folder / names[-1]).exists():
        names.append(f"damaged_checkpoint_{number}_{len(names) + 1}")
    return folder / names[-1]


def _restore(
    path: pathlib.Path, templates: Mapping[str, Any], optional: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    _verify(path)
    facts = read_facts(path)
    if facts.get("format") != FORMAT:
        raise _MisfitError(
            f"Checkpoint {path} has format {facts.get('format')}, this version "
            f"reads {FORMAT}."
        )
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    parts = {}
    for name, template in templates.items():
        if not (path / name).is_dir():
            if name in optional:
                continue
            raise _MisfitError(f"Checkpoint {path} has no part {name!r}.")
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            metadata = reader.metadata(path / name).item_metadata
            differences = tree_differences(metadata.tree, template)
            if differences:
                raise _MisfitError(
                    f"Checkpoint {path} does not fit: {'; '.join(differences)}"
                )
            wanted = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape,
                    x.dtype,
                    sharding=getattr(x, "sharding", None) or first_device,
                ),
                template,
            )
            parts[name] = reader.restore(
                path / name, args=ocp.args.StandardRestore(wanted)
            )
    return facts, parts


def tree_differences(saved: Any, wanted: Any, *, most: int = 6) -> list[str]:
    """Says in words where the arrays of two pytrees differ.

    Args:
      saved: Pytree of leaves with `shape` and `dtype`, as found on disk.
      wanted: The same for what the program expects.
      most: How many differences are told; the rest are counted.

    Returns:
      A sentence per difference, none if structure, shapes and dtypes are the same.
    """
    left, right = _leaves_by_path(saved), _leaves_by_path(wanted)
    found = []
    for path in sorted(set(left) | set(right)):
        if left.get(path) != right.get(path):
            found.append(
                f"{path} is {left.get(path, 'absent')} on disk and "
                f"{right.get(path, 'absent')} here"
            )
    if len(found) > most:
        found = [*found[:most], f"and {len(found) - most} more differences"]
    return found


def _leaves_by_path(tree: Any) -> dict[str, str]:
    # Orbax stores NamedTuples by field name and tuples by index, so the paths are
    # compared as plain words.
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        "/".join(_key_name(key) for key in path): (
            f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _key_name(key: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
