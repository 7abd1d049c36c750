"""Tests of aps_jax.parallel.shards: what several write by rows is read as one."""

import jax
import numpy as np
import pytest

from aps_jax.parallel import shards


def make_tree():
    """Sharded leaves of several kinds, and replicated ones."""
    rng = np.random.default_rng(0)
    return {
        "frame": rng.integers(0, 255, (8, 5, 3, 3)).astype(np.uint8),
        "is_first": rng.random((8, 5)) < 0.5,
        "nested": (rng.normal(size=(8,)).astype(np.float32), np.int32(-7)),
        "moments": rng.normal(size=(2, 2)).astype(np.float32),
    }


SHARDED = {"frame": True, "is_first": True, "nested": (True, False), "moments": False}


def write(folder, tree, count):
    """Writes as each of `count` processes in turn, the last one first."""
    for index in reversed(range(count)):

        def block(value, is_sharded, index=index):
            if not is_sharded:  # Only the first one's counts.
                return shards.Block(value if index == 0 else value * 0, None)
            own = len(value) // count
            return shards.Block(value[index * own : (index + 1) * own], len(value))

        own = shards.write(folder, jax.tree.map(block, tree, SHARDED), index=index)
        assert own == folder / str(index)


@pytest.mark.parametrize("count, chunk_bytes", [(1, 2**24), (2, 30), (8, 2**24)])
def test_what_is_written_by_rows_is_read_whole_and_by_rows(
    tmp_path, monkeypatch, count, chunk_bytes
):
    monkeypatch.setattr(shards, "_CHUNK_BYTES", chunk_bytes)
    tree = make_tree()
    assert not shards.is_written(tmp_path)
    write(tmp_path, tree, count)
    assert shards.is_written(tmp_path)
    wanted = shards.leaves_by_path(tree)
    assert set(wanted) == {"frame", "is_first", "nested.0", "nested.1", "moments"}
    leaves = shards.leaves(tmp_path)
    assert set(leaves) == set(wanted)
    for path, value in wanted.items():
        found = shards.read(leaves[path])
        assert found.dtype == leaves[path].dtype == value.dtype
        assert found.shape == leaves[path].shape == np.shape(value)
        np.testing.assert_array_equal(found, value)
    for rows in (slice(3, 7), slice(0, 1), slice(4, 8)):
        np.testing.assert_array_equal(
            shards.read(leaves["frame"], rows), tree["frame"][rows]
        )


def test_files_stay_small(tmp_path, monkeypatch):
    """3 rows of 4 numbers of 8 bytes: files of 32 bytes hold a row, of 16 half of one."""
    rows = np.arange(12.0).reshape(3, 4)
    for chunk_bytes, num_files in ((96, 1), (64, 2), (32, 3), (16, 6), (1, 12)):
        monkeypatch.setattr(shards, "_CHUNK_BYTES", chunk_bytes)
        folder = tmp_path / str(chunk_bytes)
        folder.mkdir()
        own = shards.write(folder, {"x": shards.Block(rows + 1, 3)}, index=0)
        names = {path.name for path in (own / "x").iterdir()} - {".zarray"}
        assert len(names) == num_files, names
        np.testing.assert_array_equal(shards.read(shards.leaves(folder)["x"]), rows + 1)
