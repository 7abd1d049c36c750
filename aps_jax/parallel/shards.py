"""Arrays that several processes write into one folder, each its rows, and read by rows.

A folder per process, in it a zarr array per leaf, and `layout.json`, which says what of the
whole it is. A leaf is either sharded along its first axis, as many rows to each process, or
the same in all; the latter is written by the first process. How many processes wrote it does
not show in what is read.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

_LAYOUT_NAME = "layout.json"

# Bytes of a file before compression: what is read at once, and by one thread.
_CHUNK_BYTES = 2**24


class Block(NamedTuple):
    """What one process holds of a leaf."""

    rows: np.ndarray  # [rows of this process, ...], or all of a leaf that is replicated
    num_rows: int | None  # of all processes; None for a leaf that is the same in all


class Leaf(NamedTuple):
    """A leaf as it lies on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    folders: dict[int, pathlib.Path]  # of each first row


def write(folder: pathlib.Path, tree: Any, *, index: int) -> pathlib.Path:
    """Writes one process's rows; all together write the whole.

    Args:
      folder: Exists, on a file system that all processes share.
      tree: A pytree of `Block`, of the same structure in all processes.
      index: Which process this is.

    Returns:
      The folder that holds what it wrote, and nothing else.
    """
    own = folder / str(index)
    own.mkdir()
    layout = {}
    blocks = leaves_by_path(tree, is_leaf=lambda x: isinstance(x, Block))
    for path, (rows, num_rows) in blocks.items():
        if num_rows is None and index > 0:
            continue
        shape, first = rows.shape, 0
        if num_rows is not None:
            shape, first = (num_rows, *rows.shape[1:]), index * len(rows)
        layout[path] = {"dtype": rows.dtype.name, "shape": shape, "first": first}
        metadata = {
            "shape": list(rows.shape),
            "chunks": _chunk_shape(rows),
            "dtype": np.lib.format.dtype_to_descr(rows.dtype),
            "compressor": {"id": "zstd", "level": 1},
        }
        spec = {**_spec(own / path), "metadata": metadata}
        ts.open(spec, create=True).result().write(rows).result()
    (own / _LAYOUT_NAME).write_text(json.dumps(layout))
    return own


def is_written(folder: pathlib.Path) -> bool:
    """Returns whether a folder is of this format."""
    return (folder / "0" / _LAYOUT_NAME).exists()


def leaves(folder: pathlib.Path) -> dict[str, Leaf]:
    """Returns what lies in a folder, by the path of each leaf.

    Raises:
      OSError: It cannot be read.
      ValueError: It is damaged.
    """
    found: dict[str, Leaf] = {}
    for own in folder.iterdir():
        for path, part in json.loads((own / _LAYOUT_NAME).read_text()).items():
            leaf = Leaf(tuple(part["shape"]), np.dtype(part["dtype"]), {})
            found.setdefault(path, leaf).folders[part["first"]] = own / path
    return found


def read(leaf: Leaf, rows: slice | None = None) -> np.ndarray:
    """Reads a leaf, or some rows of it.

    Args:
      leaf: From `leaves`.
      rows: Which rows, with both ends; None for all.
    """
    found = []
    for first, path in sorted(leaf.folders.items()):
        store = ts.open(_spec(path), open=True).result()
        if rows is not None:
            start = max(rows.start - first, 0)
            stop = min(rows.stop - first, store.shape[0])
            if start >= stop:
                continue
            store = store[start:stop]
        found.append(store.read().result())
    return np.array(found[0]) if len(found) == 1 else np.concatenate(found)


def leaves_by_path(tree: Any, **options: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by a path that can be the name of a folder."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, **options)
    }


def _chunk_shape(rows: np.ndarray) -> list[int]:
    """Cuts along the first two axes, so that no file is much larger than it should be."""
    shape = list(rows.shape)
    num_bytes = rows.nbytes
    for axis, length in enumerate(shape[:2]):
        if num_bytes > _CHUNK_BYTES and length:
            one = num_bytes // length
            shape[axis] = max(_CHUNK_BYTES // max(one, 1), 1)
            num_bytes = one * shape[axis]
    return [max(length, 1) for length in shape]


def _spec(path: pathlib.Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}/"}}
