"""Checkpoints: Orbax writes them in the background, checksums verify what is read."""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging

from aps_jax.parallel import processes
from aps_jax.runs import folders

FORMAT = 5
METADATA_NAME = "metadata.json"
MANIFEST_NAME = "manifest.sha256"

# Orbax writes these two after the manifest. Nothing is ever read from them.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST_NAME)
_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's suffix while it writes a checkpoint
_DELETING = "deleting"  # a checkpoint is moved here whole, then deleted
_REPLACED = "replaced_"  # prefix of a checkpoint until a new one of its step is whole
# Bytes of a chunk before compression: what one thread compresses and reads at once.
_CHUNKS = ocp.SaveArgs(chunk_byte_size=2**24)
_PLAIN_PATH = re.compile(r"[\w./ +=,@%:-]*", re.ASCII)
_MOST_DIFFERENCES = 6  # that are told one by one


class _MisfitError(ValueError):
    """A checkpoint is whole, but not what the program expects."""


class Policy(NamedTuple):
    """Which checkpoints stay on disk once a newer one is whole."""

    keep_last: int = 2  # newest
    keep_every: int = 0  # the first at or after each multiple of this; 0 for none
    keep_best: bool = False  # the one of the highest score

    def kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """Returns which steps stay of those in `scores`, in which None is no score."""
        steps = sorted(scores)
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            # The first of each interval, so that the choice never changes later.
            first = {step // self.keep_every: step for step in reversed(steps)}
            kept |= {step for interval, step in first.items() if interval > 0}
        known = [(score, step) for step, score in scores.items() if score is not None]
        if self.keep_best and known:
            kept.add(max(known)[1])
        return kept


_TWO_NEWEST = Policy()


class Restored(NamedTuple):
    """What `Checkpointer.restore_newest` found."""

    metadata: dict[str, Any]
    items: dict[str, Any]
    step: int


class Checkpointer:
    """Saves and restores the state of one stage in one folder.

    A checkpoint is a folder named by its step. It holds a folder of arrays for each
    item (a pytree, such as `agent`); `metadata.json`; and `manifest.sha256`, which
    `sha256sum --check` reads. Orbax writes it under another name and renames it last,
    so a step always names a whole checkpoint. Several processes write their own shards,
    on a file system that all of them share.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        policy: Policy = _TWO_NEWEST,
        warn: Callable[[str], None] = logging.warning,
    ):
        """Opens a folder, which the first save creates.

        `warn` is called with a sentence for every damaged checkpoint.

        Raises:
          ValueError: The path is a file.
        """
        folder = pathlib.Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, not a folder of checkpoints.")
        self._folder = folder.resolve()
        self._policy = policy
        self._warn = warn
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdecimal())

    def save(
        self, step: int, items: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        Waits for the previous save first. Collective: all processes must call it.

        Args:
          step: Name of the checkpoint. A larger step is newer.
          items: Pytrees of arrays by name, of several processes global arrays.
          metadata: JSON values. `keep_best` ranks its `score`, if there is one. Each
            process restores its own `environment`; all else is that of the primary.

        Raises:
          OSError: This save cannot begin, or the previous one failed. In the latter
            case this one is on its way.
          ValueError: `metadata` is not JSON.
        """
        values = {"format": FORMAT, **metadata}
        if "environment" in metadata:
            values["environment"] = processes.all_gather(metadata["environment"])
        text = json.dumps(values, indent=1, allow_nan=False)
        previous = self._join()
        failures = processes.all_gather(previous and str(previous))
        processes.broadcast_from_primary(lambda: self._prepare(step))
        scores = {old: self._score(old) for old in self.steps()}
        kept = self._policy.kept({**scores, step: metadata.get("score")})
        with contextlib.ExitStack() as held:
            root = held.enter_context(_orbax_path(self._folder))
            num_arrays = {name: len(jax.tree.leaves(x)) for name, x in items.items()}
            # A manager for each save: the folder may have been deleted since the last
            # one, and a save that failed leaves no state behind.
            manager = ocp.CheckpointManager(
                root,
                options=ocp.CheckpointManagerOptions(
                    create=False,
                    lightweight_initialize=True,
                    save_root_metadata=False,
                    todelete_subdir=_DELETING,
                    preservation_policy=ocp.checkpoint_managers.CustomSteps(list(kept)),
                    async_options=ocp.options.AsyncOptions(
                        post_finalization_callback=lambda: _complete(
                            root, step, text, num_arrays
                        )
                    ),
                ),
            )
            held.callback(manager.close)
            args = {
                name: ocp.args.StandardSave(item, jax.tree.map(lambda _: _CHUNKS, item))
                for name, item in items.items()
            }
            try:
                manager.save(step, args=ocp.args.Composite(**args), force=True)
            # Orbax and TensorStore raise errors of many types, also for a full disk.
            except Exception as error:
                raise OSError(_line(error)) from error
            self._saving = self._thread.submit(self._finish, manager, held.pop_all())
        for failure in filter(None, failures):
            raise OSError(failure)

    def failure(self) -> OSError | None:
        """Returns why the last save failed, once; None if it did not, or goes on."""
        is_done = self._saving is not None and self._saving.done()
        return self._join() if is_done else None

    def wait_until_finished(self) -> None:
        """Waits until the save under way is on disk; an `OSError` if it failed."""
        if (failure := self._join()) is not None:
            raise failure

    def close(self) -> None:
        """Waits for the save under way and ends the thread; a failure is a warning."""
        if (failure := self._join()) is not None:
            self._warn(str(failure))
        self._thread.shutdown()

    def clean(self) -> None:
        """Removes what a dead process left half done; for the folder's owner alone."""
        if not self._folder.is_dir():
            return
        for path in list(self._folder.iterdir()):
            current = self._folder / path.name.removeprefix(_REPLACED)
            is_replaced = path.name.startswith(_REPLACED)
            if is_replaced and not current.exists():
                path.rename(current)
            elif is_replaced or path.name == _DELETING or _TEMPORARY in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def restore_newest(
        self,
        templates: Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        optional: Collection[str] = (),
        set_damaged_aside: bool = False,
    ) -> Restored | None:
        """Restores the newest checkpoint whose every file is as it was written.

        Warns of each damaged one: its file, its step, and the step that is restored.

        Args:
          templates: Item name to a pytree of arrays or of `jax.ShapeDtypeStruct`; or
            a function that makes these from the checkpoint's metadata.
          optional: Items that a checkpoint may lack; the result lacks them, too.
          set_damaged_aside: Whether to rename damaged checkpoints, so that a run that
            reaches their steps again can save there.

        Returns:
          What was found, sharded as the templates, or on the first device where they do
          not say; None if there is no checkpoint.

        Raises:
          ValueError: Structure, shapes, dtypes or the format differ (the message shows
            both sides), or there are checkpoints and none of them can be read.
        """
        damaged: dict[int, str] = {}
        for step in reversed(processes.broadcast_from_primary(self.steps)):
            path = self._path(step)
            reason = processes.broadcast_from_primary(functools.partial(_damage, path))
            try:
                if reason is None:
                    found = _restore(path, templates, optional)
                    break
            except _MisfitError:
                raise
            except Exception as error:
                if processes.num_processes() > 1:
                    raise  # Others may have read it: they must not go apart.
                reason = _line(error)
            damaged[step] = reason
        else:
            if not damaged:
                return None
            reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise ValueError(
                f"None of the checkpoints in {self._folder} can be read ({reasons})."
            )
        for bad, reason in damaged.items() if processes.is_primary() else ():
            self._warn(
                f"checkpoint {self._path(bad)} cannot be read ({reason}): step "
                f"{step:,} is used in place of step {bad:,}."
            )
            if set_damaged_aside:
                aside = self._folder.with_name(f"damaged_checkpoint_{bad}")
                while aside.exists():
                    aside = aside.with_name(f"{aside.name}_again")
                self._path(bad).rename(aside)
        return Restored(*found, step)

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / str(step)

    def _score(self, step: int) -> float | None:
        try:
            return read_metadata(self._path(step)).get("score")
        except ValueError:
            return None

    def _prepare(self, step: int) -> None:
        """Makes room for a checkpoint in the folder, or raises an `OSError`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        newest = [p for old in self.steps()[-1:] for p in self._path(old).rglob("*")]
        needed = sum(path.stat().st_size for path in newest if path.is_file())
        if shutil.disk_usage(self._folder).free < needed:
            # Early, since Orbax would say so late and with pages of tracebacks.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._path(step).exists():
            self._path(step).rename(self._folder / f"{_REPLACED}{step}")

    def _finish(
        self, manager: ocp.CheckpointManager, held: contextlib.ExitStack
    ) -> None:
        """Waits for Orbax, then removes what the new checkpoint replaces."""
        with held:
            try:
                manager.wait_until_finished()
                if processes.is_primary():
                    _to_disk(self._folder)
            finally:
                if processes.is_primary():
                    self.clean()

    def _join(self) -> OSError | None:
        """Waits for the save under way; returns why it failed."""
        saving, self._saving = self._saving, None
        error = None if saving is None else saving.exception()
        return None if error is None else OSError(_line(error))


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the metadata of a checkpoint, unverified, or raises a `ValueError`."""
    return folders.read_json(pathlib.Path(path, METADATA_NAME))


@contextlib.contextmanager
def _orbax_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path of an existing folder that Orbax and TensorStore understand.

    Orbax takes brackets for a pattern, and TensorStore refuses what is not UTF-8. On
    Linux every open folder also has a plain name.
    """
    if _PLAIN_PATH.fullmatch(str(folder)):
        yield folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield pathlib.Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _complete(
    root: pathlib.Path, step: int, metadata: str, num_arrays: Mapping[str, int]
) -> None:
    """Adds metadata and manifest to a checkpoint that Orbax is about to rename.

    Runs in the primary process, once the arrays of all processes are written. Raises an
    error if something cannot be written, or read back.
    """
    (folder,) = (p for p in root.iterdir() if p.name.startswith(f"{step}{_TEMPORARY}"))
    (folder / METADATA_NAME).write_text(metadata)
    for name, expected in num_arrays.items():
        _read_back(folder / name, expected)
    (folder / MANIFEST_NAME).write_text(_manifest(folder))
    for path in [*folder.rglob("*"), folder]:
        _to_disk(path)


def _read_back(item: pathlib.Path, num_arrays: int) -> None:
    """Reads a chunk of every array of an item, or raises an error of any type."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}
    keys = [key.decode() for key in ts.KvStore.open(store).result().list().result()]
    paths = [key.removesuffix(".zarray") for key in keys if key.endswith(".zarray")]
    if len(paths) != num_arrays:
        raise OSError(f"{len(paths)} of {num_arrays} arrays can be read in {item}")
    for path in paths:
        array = ts.open({"driver": "zarr", "kvstore": {**store, "path": path}}).result()
        array[(slice(0, 1),) * array.rank].read().result()


def _manifest(folder: pathlib.Path) -> str:
    """Returns a line per file of a checkpoint: its SHA-256 and its path."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _UNLISTED:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {name}\n")
    return "".join(lines)


def _damage(folder: pathlib.Path) -> str | None:
    """Returns which files of a checkpoint are not as they were written, or None."""
    try:
        written = (folder / MANIFEST_NAME).read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return f"{MANIFEST_NAME} is missing or damaged"
    differing = set(written.split("\n")) ^ set(_manifest(folder).split("\n"))
    if not differing:
        return None
    names = sorted({line[66:] for line in differing})  # after a digest and two spaces
    names = [name for name in names if (folder / name).is_file()] or names
    return f"{', '.join(names)} and {MANIFEST_NAME} do not fit together"


def _to_disk(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: BaseException) -> str:
    """Returns one line about an error."""
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, OSError) else f"{type(error).__name__}: {first}"


def _restore(
    path: pathlib.Path,
    templates: Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]],
    optional: Collection[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the metadata and items of a checkpoint; raises `_MisfitError`."""
    metadata = read_metadata(path) if (path / METADATA_NAME).exists() else {}
    if metadata.get("format") != FORMAT:
        there = metadata.get("format", "2 or older")
        raise _MisfitError(
            f"Checkpoint {path} has format {there}, this version reads {FORMAT}."
        )
    if "environment" in metadata:
        of_all = metadata["environment"]
        is_same_count = len(of_all) == processes.num_processes()
        metadata["environment"] = of_all[jax.process_index()] if is_same_count else None
    if callable(templates):
        templates = templates(metadata)
    items = {}
    # Reading needs no other process: the first alone films a run's agent, and would
    # wait for the others for ever.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    with (
        _orbax_path(path) as root,
        ocp.Checkpointer(
            ocp.StandardCheckpointHandler(), multiprocessing_options=alone
        ) as reader,
    ):
        for name, template in templates.items():
            if not (path / name).is_dir():
                if name in optional:
                    continue
                raise _MisfitError(f"Checkpoint {path} has no item {name!r}.")
            saved = reader.metadata(root / name).item_metadata.tree
            if differences := tree_differences(saved, template):
                raise _MisfitError(
                    f"Checkpoint {path} does not fit: {'; '.join(differences)}"
                )
            wanted = ocp.args.StandardRestore(jax.tree.map(_placed, template))
            items[name] = reader.restore(root / name, args=wanted)
    return metadata, items


def _placed(template: Any) -> jax.ShapeDtypeStruct:
    """Returns a template with a sharding: the first device, if it does not name one."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(template, "sharding", None) or first
    return jax.ShapeDtypeStruct(template.shape, template.dtype, sharding=sharding)


def tree_differences(saved: Any, wanted: Any) -> list[str]:
    """Describes where the arrays of two pytrees differ, none if they do not.

    Args:
      saved: Pytree of leaves with `shape` and `dtype`, as found on disk.
      wanted: The same for what the program expects.
    """
    left, right = _leaves_by_path(saved), _leaves_by_path(wanted)
    found = [
        f"{path} is {left.get(path, 'absent')} on disk and "
        f"{right.get(path, 'absent')} here"
        for path in sorted(set(left) | set(right))
        if left.get(path) != right.get(path)
    ]
    told, more = found[:_MOST_DIFFERENCES], found[_MOST_DIFFERENCES:]
    return [*told, f"and {len(more)} more differences"] if more else told


def _leaves_by_path(tree: Any) -> dict[str, str]:
    # Orbax stores NamedTuples by field name and tuples by index, so the paths are
    # compared as plain words.
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: hasattr(x, "shape")
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
