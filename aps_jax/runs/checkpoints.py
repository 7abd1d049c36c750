"""Checkpoints: written whole in the background, verified before they are restored.

A checkpoint is a folder named by its number: a subfolder of arrays per part, written by
Orbax, or of what several processes share out by `shards`; `facts.json`; and `manifest.sha256`, the checksum of every other file as `sha256sum
--check` reads it. It is written under another name and renamed last, so that a number
always names a whole one. Of several processes each writes its rows, and the first all else:
it waits for the others and renames. No pickle anywhere: arrays and JSON alone, so that a stranger's
checkpoint cannot run code.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from aps_jax.parallel import devices, processes, shards

FORMAT = 2
FACTS_NAME = "facts.json"
MANIFEST_NAME = "manifest.sha256"

# Prefixes of folders that are no checkpoints: not yet, or not any more.
_WRITING = "writing_"
_DELETING = "deleting_"
# A whole one that another of its number takes the place of.
_REPLACED = "replaced_"

# The saves of this process, by which several processes know them: all begin the same.
_SAVES = itertools.count()


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
        self._orbax = _make_orbax()
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

        Waits for the save before it, if that is still under way. All processes of a run
        must call it; what fails in any of them is told by the first.

        Args:
          number: Name of the checkpoint; a larger number is a newer one.
          parts: Pytrees of arrays by name of the part.
          facts: JSON values; `score`, if there and not None, is what `keep_best` ranks.
            Of them each process finds its own `environment` again, and all others those
            of the first.

        Raises:
          OSError: The save before this one failed. This one has begun none the less.
          ValueError: `facts` are no JSON.
        """
        text = json.dumps({"format": FORMAT, **facts}, indent=1, allow_nan=False)
        failure = self._wait()
        copied = {name: _copy_to_host(part) for name, part in parts.items()}
        write = self._write if processes.is_primary() else self._write_share
        order = f"save/{next(_SAVES)}"
        self._saving = self._thread.submit(write, number, copied, text, order)
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
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def choose() -> int | None:
            number, *restored = self._restore_whole(
                templates, optional, set_damaged_aside
            )
            found.extend(restored)
            return number

        number = processes.broadcast_from_primary(choose)
        if number is None:
            return None
        # What the first has found whole need not be verified again.
        return found[0] if found else self._read(number, templates, optional)

    def _restore_whole(
        self,
        templates: Mapping[str, Any],
        optional: tuple[str, ...],
        set_damaged_aside: bool,
    ) -> tuple[Any, ...]:
        """Returns the number of the newest whole checkpoint and what it holds, or None."""
        numbers = self.numbers()[::-1]
        damaged: list[pathlib.Path] = []
        found: tuple[Any, ...] = (None,)
        for number in numbers:
            path = self._folder / str(number)
            try:
                _verify(path)
                found = (number, self._read(number, templates, optional))
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
        if numbers and found[0] is None:
            raise ValueError(f"None of the checkpoints in {self._folder} can be read.")
        if set_damaged_aside:
            for path in damaged:
                path.rename(_free_name(self._folder.parent, path.name))
        return found

    def _read(
        self, number: int, templates: Mapping[str, Any], optional: tuple[str, ...]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        return _restore(self._folder / str(number), templates, optional)

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

    def _write(
        self, number: int, parts: dict[str, Any], facts: str, order: str
    ) -> None:
        """Writes a checkpoint and then applies the policy; runs in the thread."""
        temporary = self._folder / f"{_WRITING}{number}"
        try:
            with _telling(f"{order}/room"):
                self._folder.mkdir(parents=True, exist_ok=True)
                self.clean()
                self._check_room()
                temporary.mkdir()
                for name, part in parts.items():
                    if _is_shared(part):
                        (temporary / name).mkdir()
            with _hearing(order) as manifests:
                for name, part in parts.items():
                    if _is_shared(part):
                        shards.write(temporary / name, part, index=0)
                    else:
                        self._orbax.save(
                            temporary / name, args=ocp.args.StandardSave(part)
                        )
                (temporary / FACTS_NAME).write_text(facts)
                own = _own_paths(temporary)
                manifests.append(_lines(temporary, own))
                for path in own:
                    _to_disk(path)
            (temporary / MANIFEST_NAME).write_text("".join(manifests))
            for path in (temporary / MANIFEST_NAME, temporary):
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

    def _write_share(
        self, number: int, parts: dict[str, Any], facts: str, order: str
    ) -> None:
        """Writes what one process but the first has of a checkpoint; runs in the thread."""
        if "error" in processes.hear(f"{order}/room"):
            return  # The first tells of it.
        temporary = self._folder / f"{_WRITING}{number}"
        index = jax.process_index()
        with contextlib.suppress(Exception), _telling(f"{order}/{index}") as answer:
            folders = [
                shards.write(temporary / name, part, index=index)
                for name, part in parts.items()
                if _is_shared(part)
            ]
            own = temporary / _facts_name(index)
            own.write_text(facts)
            files = [own, *(path for folder in folders for path in folder.rglob("*"))]
            for path in files + folders:
                _to_disk(path)
            answer["manifest"] = _lines(temporary, files)

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


def _facts_name(index: int) -> str:
    """Returns the file of a process's own facts."""
    return FACTS_NAME if index == 0 else f"facts_{index}.json"


@contextlib.contextmanager
def _telling(key: str) -> Iterator[dict[str, Any]]:
    """Tells the other processes how a piece of work ended, and what it yields."""
    answer: dict[str, Any] = {}
    try:
        yield answer
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        answer["error"] = f"{type(error).__name__}: {lines[0]}"
        raise
    finally:
        if processes.num_processes() > 1:
            processes.tell(key, answer)


@contextlib.contextmanager
def _hearing(order: str) -> Iterator[list[str]]:
    """Waits after a piece of work, failed or not, for those of the other processes.

    Raises:
      OSError: One of them failed.
    """
    manifests: list[str] = []
    answers: list[dict[str, Any]] = []
    try:
        yield manifests
    finally:
        for index in range(1, processes.num_processes()):
            answers.append(processes.hear(f"{order}/{index}"))
    for index, answer in enumerate(answers, start=1):
        if "error" in answer:
            raise OSError(f"process {index}: {answer['error']}")
        manifests.append(answer["manifest"])


def _is_shared(part: Any) -> bool:
    """Returns whether all processes write a part that was copied to the host."""
    leaves = jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, shards.Block))
    return any(isinstance(leaf, shards.Block) for leaf in leaves)


def _make_orbax() -> ocp.Checkpointer:
    """Makes an Orbax that takes this process for the only one."""
    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.StandardCheckpointHandler())
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"process_{index}",
    )
    return ocp.Checkpointer(
        ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        multiprocessing_options=alone,
    )


def _copy_to_host(tree: Any) -> Any:
    """Copies arrays to the host's own memory; of sharded ones, this process's rows.

    On a CPU `asarray` returns a view of an array that is donated to the next step. What is
    written must not depend on whether XLA then notices the view and copies.

    Returns:
      The tree with NumPy arrays, or with `shards.Block` where other processes hold a part
      of it.
    """

    def copy(x: Any) -> np.ndarray:
        is_elsewhere = (
            isinstance(x, jax.Array) and next(iter(x.devices())).platform != "cpu"
        )
        return np.asarray(x) if is_elsewhere else np.array(x)

    def block(x: jax.Array) -> shards.Block:
        if x.is_fully_replicated:
            return shards.Block(copy(x), None)
        return shards.Block(devices.own(x), x.shape[0])

    is_shared = any(
        isinstance(x, jax.Array)
        and not (x.is_fully_addressable or x.is_fully_replicated)
        for x in jax.tree.leaves(tree)
    )
    return jax.tree.map(block if is_shared else copy, tree)


def _own_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns what the first process has written of a checkpoint, and vouches for."""
    others = range(1, processes.num_processes())
    theirs = {_facts_name(index) for index in others}
    theirs |= {f"{p.name}/{index}" for p in folder.iterdir() for index in others}
    return [
        path
        for path in folder.rglob("*")
        if "/".join(path.relative_to(folder).parts[:2]) not in theirs
    ]


def _manifest(folder: pathlib.Path) -> str:
    """Returns a line per file of a checkpoint: its SHA-256 and its path."""
    return _lines(folder, folder.rglob("*"))


def _lines(folder: pathlib.Path, paths: Iterable[pathlib.Path]) -> str:
    lines = []
    for path in sorted(paths):
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
    # Several processes write their lines one after the other.
    differing = set(written.split("\n")) ^ set(_manifest(folder).split("\n"))
    if not differing:
        return
    names = {line[66:] for line in differing}
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
    facts = read_facts(path)
    if facts.get("format") != FORMAT:
        raise _MisfitError(
            f"Checkpoint {path} has format {facts.get('format')}, this version "
            f"reads {FORMAT}."
        )
    if "environment" in facts:
        own = path / _facts_name(jax.process_index())
        # Each process wrote such a file.
        is_same_count = processes.num_processes() == len(list(path.glob("facts*.json")))
        facts["environment"] = (
            json.loads(own.read_text())["environment"] if is_same_count else None
        )
    parts = {}
    for name, template in templates.items():
        if not (path / name).is_dir():
            if name in optional:
                continue
            raise _MisfitError(f"Checkpoint {path} has no part {name!r}.")
        read = _read_shared if shards.is_written(path / name) else _read_plain
        parts[name] = read(path / name, template)
    return facts, parts


def _check_fits(path: pathlib.Path, saved: Any, wanted: Any) -> None:
    differences = tree_differences(saved, wanted)
    if differences:
        raise _MisfitError(f"Checkpoint {path} does not fit: {'; '.join(differences)}")


def _where(template: Any) -> jax.sharding.Sharding:
    """Returns where a leaf is wanted: if its template does not say, on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return getattr(template, "sharding", None) or first


def _read_plain(path: pathlib.Path, template: Any) -> Any:
    """Reads a part that one process wrote."""
    with _make_orbax() as reader:
        metadata = reader.metadata(path).item_metadata
        _check_fits(path.parent, metadata.tree, template)

        def wanted(x: Any) -> Any:
            where = _where(x)
            if where.is_fully_addressable:
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
            # To the host first, in no memory of its own.
            return np.broadcast_to(np.zeros((), x.dtype), x.shape)

        restored = reader.restore(
            path, args=ocp.args.StandardRestore(jax.tree.map(wanted, template))
        )

    def place(x: Any, leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return leaf
        if x.sharding.is_fully_replicated:
            return devices.place(leaf, x.sharding)
        return devices.place(
            leaf[devices.share(len(leaf), x.sharding.mesh)], x.sharding
        )

    return jax.tree.map(place, template, restored)


def _read_shared(path: pathlib.Path, template: Any) -> Any:
    """Reads this process's rows of a part that several wrote."""
    leaves = shards.leaves(path)
    _check_fits(path.parent, leaves, shards.leaves_by_path(template))

    def read(name: str, x: Any) -> jax.Array:
        where = _where(x)
        if where.is_fully_addressable:
            return jax.device_put(shards.read(leaves[name]), where)
        rows = None
        if not where.is_fully_replicated:
            rows = devices.share(x.shape[0], where.mesh)
        return devices.place(shards.read(leaves[name], rows), where)

    named = shards.leaves_by_path(template)
    return jax.tree.unflatten(
        jax.tree.structure(template), [read(name, x) for name, x in named.items()]
    )


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
