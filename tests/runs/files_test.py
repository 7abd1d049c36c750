"""Tests of what a run writes: folders, checkpoints, pictures, resources."""

import collections
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import shutil

import fakes
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.report import run_pictures
from aps_jax.runs import checkpoints, folders, machine, metrics
from aps_jax.train import preflight, recorders

# Folders.


def test_json_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "x.json"
    folders.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        folders.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_broken_config_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        folders.read_run(tmp_path)


def test_a_config_of_another_schema_is_refused(tmp_path):
    folders.write_json(tmp_path / "config.json", {"schema": 9})
    with pytest.raises(ValueError, match="schema 9, this version reads 1"):
        folders.read_run(tmp_path)


def test_a_run_knows_its_versions(tmp_path):
    config = config_lib.Config()
    assert not folders.open_run(tmp_path / "r", stage="pretrain", config=config)
    facts, found = folders.read_run(tmp_path / "r")
    assert found == config
    assert facts["versions"]["jax"] == jax.__version__
    assert folders.open_run(tmp_path / "r", stage="pretrain", config=config)


def open_finetuning(workdir, init):
    return folders.open_run(
        workdir, stage="finetune", config=config_lib.Config(), init=init
    )


def test_a_run_is_known_by_its_id_not_by_its_path(tmp_path, monkeypatch):
    config = config_lib.Config()
    folders.open_run(tmp_path / "p", stage="pretrain", config=config)
    assert not open_finetuning(tmp_path / "f", f"{tmp_path}/p/")
    metadata, _ = folders.read_run(tmp_path / "f")
    assert metadata["init"] == str(tmp_path / "p")
    shutil.copytree(tmp_path / "p", tmp_path / "copy")
    shutil.copytree(tmp_path / "f", tmp_path / "copy_of_f")
    (tmp_path / "link").symlink_to("copy")
    monkeypatch.chdir(tmp_path)
    for init in ("p", "./p/", tmp_path / "copy", "link", "copy/../link/"):
        assert open_finetuning("f", init)
        assert open_finetuning(tmp_path / "copy_of_f", init)
    shutil.rmtree("copy")
    folders.open_run("other", stage="pretrain", config=config)
    for init in ("other", None):
        with pytest.raises(ValueError, match="holds another run .init is "):
            open_finetuning("f", init)
    shutil.rmtree("p")
    folders.open_run("p", stage="pretrain", config=config)
    with pytest.raises(ValueError, match="init is 'an earlier run in .*/p' there"):
        open_finetuning("f", "p")


@pytest.mark.parametrize("text", ["gs://b/x", "s3://b/x", pathlib.Path("gs://b/x")])
def test_urls_are_refused_in_one_line(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for refuse in (folders.as_path, lambda text: open_finetuning(text, None)):
        with pytest.raises(ValueError, match="is a URL") as caught:
            refuse(text)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    assert folders.as_path("~/y") == pathlib.Path("/home/x/y")
    assert folders.as_path("a/~") == pathlib.Path("a/~")
    with pytest.raises(ValueError, match="home"):
        folders.as_path("~nobody_of_this_name/y")


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, code):
    assert folders.lock_warning(tmp_path) is None

    def no_locks(file, operation):
        raise OSError(getattr(errno, code), "no locks")

    folders.write_json(tmp_path / "config.json", {})
    monkeypatch.setattr(folders.fcntl, "flock", no_locks)
    said = []
    with folders.RunLock(tmp_path, warn=said.append) as lock:
        assert not lock.ensure()
    assert said == [folders.lock_warning(tmp_path)]
    assert str(tmp_path) in said[0] and "no locks" in said[0]


def test_git_is_asked_once(monkeypatch):
    found = folders.git_commit()
    monkeypatch.setattr(folders.subprocess, "run", None)
    assert folders.git_commit() == found


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        folders.open_run(tmp_path / "f", stage="pretrain", config=config_lib.Config())


# Checkpoints.


def make_tree(width=3):
    return {"layer": {"kernel": jnp.ones((2, width)), "bias": jnp.zeros(width)}}


def test_checkpoints_come_back_bit_for_bit(tmp_path):
    saver = checkpoints.Checkpointer(tmp_path / "c")
    tree = {"x": jax.random.normal(jax.random.key(0), (5,)), "n": jnp.int32(3)}
    for number in (1, 2, 3):
        saver.save(
            number,
            {"agent": tree, "loop": {"loop": jnp.arange(number)}},
            {"agent_steps": number},
        )
    saver.close()
    reader = checkpoints.Checkpointer(tmp_path / "c")
    metadata, items, step = reader.restore_newest(
        {
            "agent": jax.eval_shape(lambda: tree),
            "loop": {"loop": jnp.zeros(3, jnp.int32)},
        }
    )
    reader.close()
    assert metadata["agent_steps"] == step == 3
    np.testing.assert_array_equal(items["agent"]["x"], tree["x"])
    assert items["agent"]["n"] == 3
    np.testing.assert_array_equal(items["loop"]["loop"], [0, 1, 2])


@pytest.mark.parametrize(
    "name",
    [
        *("lr=[1e-4]", "a[1]b", "a b", "a\\b", "*?", "\u00fc\u4e2d", "{x}"),
        *("a'b#c", "a%20b", 'a"b', "new\nline", os.fsdecode(b"\xff\xfe")),
    ],
)
def test_what_is_saved_can_be_read_under_every_path(tmp_path, name):
    saver = checkpoints.Checkpointer(tmp_path / name / "c")
    saver.save(7, {"agent": make_tree()}, {})
    saver.close()
    found = checkpoints.Checkpointer(tmp_path / name / "c").restore_newest(
        {"agent": make_tree()}
    )
    assert found.step == 7
    np.testing.assert_array_equal(found.items["agent"]["layer"]["kernel"], 1.0)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_may_be_relative_or_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    (tmp_path / "real").mkdir()
    (tmp_path / "elsewhere").mkdir()
    saver = checkpoints.Checkpointer("link/c")
    monkeypatch.chdir(tmp_path / "elsewhere")
    saver.save(7, {"agent": make_tree()}, {})
    saver.close()
    assert checkpoints.Checkpointer("../real/c").steps() == [7]


def test_arrays_that_cannot_be_read_back_are_no_checkpoint(tmp_path, monkeypatch):
    saver = checkpoints.Checkpointer(tmp_path / "c")
    saver.save(1, {"agent": make_tree()}, {})
    saver.wait_until_finished()
    # So it is where Orbax does not find what it has written.
    merge = (
        "orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files"
    )

    async def merge_nothing(*args, **kwargs):
        pass

    monkeypatch.setattr(merge, merge_nothing)
    saver.save(2, {"agent": make_tree()}, {})
    with pytest.raises(OSError, match="0 of 2 arrays can be read"):
        saver.wait_until_finished()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_no_checkpoint_is_nothing(tmp_path):
    reader = checkpoints.Checkpointer(tmp_path / "c")
    assert reader.restore_newest({"agent": make_tree()}) is None
    reader.close()


def damage(folder, kind):
    """Damages the largest file of a checkpoint's arrays."""
    files = [path for path in (folder / "agent").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("kind", ["truncated", "missing", "overwritten"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, kind, caplog):
    saver = checkpoints.Checkpointer(tmp_path / "c")
    for number in (1, 2):
        saver.save(number, {"agent": {"x": jnp.arange(1000.0) * number}}, {})
    saver.close()
    damage(tmp_path / "c" / "2", kind)
    reader = checkpoints.Checkpointer(tmp_path / "c")
    template = {"agent": {"x": jnp.zeros(1000)}}
    found = reader.restore_newest(template, set_damaged_aside=True)
    np.testing.assert_array_equal(found.items["agent"]["x"], np.arange(1000.0))
    assert found.step == 1
    assert str(tmp_path / "c" / "2") in caplog.text
    # Its number is free again, and what is left of it is kept.
    assert (tmp_path / "damaged_checkpoint_2").is_dir()
    reader.save(2, {"agent": {"x": jnp.ones(1000)}}, {})
    reader.close()
    again = checkpoints.Checkpointer(tmp_path / "c")
    np.testing.assert_array_equal(
        again.restore_newest(template).items["agent"]["x"], 1.0
    )
    damage(tmp_path / "c" / "1", kind)
    damage(tmp_path / "c" / "2", kind)
    with pytest.raises(ValueError, match="None of the checkpoints in"):
        again.restore_newest(template)
    again.close()


UNLISTED = ("manifest.sha256", "_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Checkpoints 1 and 2, of which 2 is to be damaged, and all files of 2."""
    folder = tmp_path_factory.mktemp("flips") / "c"
    saver = checkpoints.Checkpointer(folder)
    for number in (1, 2):
        saver.save(number, {"agent": make_tree(number)}, {"agent_steps": number})
    saver.close()
    return folder, sorted(p for p in (folder / "2").rglob("*") if p.is_file())


@hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
@hypothesis.given(data=st.data())
def test_any_byte_that_changes_or_lacks_falls_back(two_checkpoints, data):
    """Never garbage: what is restored is checkpoint 2 as it was, or checkpoint 1."""
    folder, files = two_checkpoints
    path = data.draw(st.sampled_from(files))
    # Orbax writes these after the manifest, and nobody reads them.
    hypothesis.assume(path.parent != folder / "2" or path.name not in UNLISTED[1:])
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        flipped = whole[place] ^ (1 << data.draw(st.integers(0, 7)))
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
    else:
        path.write_bytes(whole[:place])
    said = []
    reader = checkpoints.Checkpointer(folder, warn=said.append)
    try:
        found = reader.restore_newest({"agent": make_tree(1)})
    finally:
        path.write_bytes(whole)
    assert found.metadata["agent_steps"] == found.step == 1
    np.testing.assert_array_equal(
        found.items["agent"]["layer"]["kernel"], np.ones((2, 1))
    )
    (warning,) = said
    assert str(folder / "2") in warning and path.name in warning
    assert "step 1 is used in place of step 2" in warning


def test_a_manifest_is_what_sha256sum_writes(two_checkpoints):
    folder, files = two_checkpoints
    lines = (folder / "2" / "manifest.sha256").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    assert listed == {
        path.relative_to(folder / "2").as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in files
        if path.parent != folder / "2" or path.name not in UNLISTED
    }


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path):
    """Donating the arrays right after `save` changes nothing in what is written."""
    saver = checkpoints.Checkpointer(tmp_path / "c")
    x = jnp.arange(200_000.0)
    step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    saver.save(1, {"agent": {"x": x}}, {})
    for _ in range(20):
        x = step(x)
    saver.wait_until_finished()
    found = saver.restore_newest({"agent": {"x": x}})
    saver.close()
    np.testing.assert_array_equal(found.items["agent"]["x"], np.arange(200_000.0))


# The first at or after each multiple of 10; the best score; the two newest.
@pytest.mark.parametrize(
    "policy, kept",
    [
        (checkpoints.Policy(keep_last=2), {24, 32}),
        (checkpoints.Policy(keep_last=1, keep_every=10), {12, 21, 32}),
        (checkpoints.Policy(keep_last=1, keep_best=True), {15, 32}),
        (checkpoints.Policy(keep_last=9), {4, 12, 15, 21, 24, 32}),
    ],
)
def test_the_policy_says_what_stays(tmp_path, policy, kept):
    scores = {4: 2.0, 12: None, 15: 5.0, 21: 5.0 - 1e-9, 24: None, 32: -1.0}
    saver = checkpoints.Checkpointer(tmp_path / "c", policy=policy)
    for number, score in scores.items():
        saver.save(number, {"agent": {"x": jnp.ones(1)}}, {"score": score})
    saver.close()
    assert set(saver.steps()) == kept
    assert {int(p.name) for p in (tmp_path / "c").iterdir()} == kept


def test_a_save_that_fails_says_so_and_leaves_what_there_was(tmp_path, monkeypatch):
    saver = checkpoints.Checkpointer(tmp_path / "c")
    part = {"agent": {"x": jnp.ones(3)}}
    saver.save(1, part, {})
    saver.wait_until_finished()
    to_disk = checkpoints._to_disk

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_to_disk", full)
    saver.save(2, part, {})
    with pytest.raises(OSError, match="No space left"):
        saver.wait_until_finished()
    assert saver.failure() is None  # Told once.
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["1"]
    saver.save(3, part, {})
    with pytest.raises(OSError, match="No space left"):
        saver.save(4, part, {})  # Of the save before it.
    saver._join()
    monkeypatch.setattr(checkpoints, "_to_disk", to_disk)
    saver.save(5, part, {})
    saver.close()
    assert saver.steps() == [1, 5]


def test_a_checkpoint_without_room_for_one_like_the_last_is_not_begun(
    tmp_path, monkeypatch
):
    saver = checkpoints.Checkpointer(tmp_path / "c")
    saver.save(1, {"agent": {"x": jnp.ones(3)}}, {})
    saver.wait_until_finished()
    size = sum(p.stat().st_size for p in (tmp_path / "c").rglob("*") if p.is_file())
    usage = collections.namedtuple("Usage", "free")
    free = [size - 1, size]
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda p: usage(free.pop(0)))
    with pytest.raises(OSError, match="No space left on device"):
        saver.save(2, {"agent": {"x": jnp.ones(3)}}, {})
    saver.save(3, {"agent": {"x": jnp.ones(3)}}, {})
    saver.close()
    assert saver.steps() == [1, 3]


def test_what_a_dead_process_left_is_no_checkpoint(tmp_path):
    for name in ("7.orbax-checkpoint-tmp", "deleting/3"):
        (tmp_path / "c" / name / "agent").mkdir(parents=True)
    saver = checkpoints.Checkpointer(tmp_path / "c")
    assert saver.steps() == []
    assert saver.restore_newest({"agent": make_tree()}) is None
    saver.clean()
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("is_renamed", [False, True])
def test_death_while_a_checkpoint_is_replaced_loses_none(tmp_path, is_renamed):
    """Of two of one number the newer counts once it has the name, else the older."""
    folder = tmp_path / "c"
    saver = checkpoints.Checkpointer(folder)
    for value in (1.0, 2.0):
        saver.save(7, {"agent": {"x": jnp.full(3, value)}}, {})
        saver.wait_until_finished()
        if value == 1.0:
            shutil.copytree(folder / "7", tmp_path / "old")
    assert [path.name for path in folder.iterdir()] == ["7"]
    (tmp_path / "old").rename(folder / "replaced_7")
    if not is_renamed:
        shutil.move(folder / "7", folder / "7.orbax-checkpoint-tmp")
    saver.clean()
    found = saver.restore_newest({"agent": {"x": jnp.ones(3)}})
    saver.close()
    assert [path.name for path in folder.iterdir()] == ["7"]
    assert found.items["agent"]["x"][0] == (2.0 if is_renamed else 1.0)


def test_a_folder_taken_by_another_is_left_alone(tmp_path):
    workdir = tmp_path / "r"
    workdir.mkdir()
    folders.write_json(workdir / "config.json", {"seed": 0})
    with folders.RunLock(workdir) as lock:
        assert not lock.ensure()
        shutil.rmtree(workdir)
        assert lock.ensure()
        assert folders.read_json(workdir / "config.json") == {"seed": 0}
        shutil.rmtree(workdir)
        workdir.mkdir()
        folders.write_json(workdir / "config.json", {"seed": 0})
        with (
            folders.RunLock(workdir),
            pytest.raises(ValueError, match="in use by another process"),
        ):
            lock.ensure()
        folders.write_json(workdir / "config.json", {"seed": 1})
        (workdir / "lock").unlink()
        with pytest.raises(ValueError, match="holds another run by now"):
            lock.ensure()


def test_a_second_process_is_kept_out_of_a_folder(tmp_path):
    folders.write_json(tmp_path / "config.json", {})
    with (
        folders.RunLock(tmp_path),
        pytest.raises(ValueError, match=f"in use by another.*process {os.getpid()} on"),
        folders.RunLock(tmp_path),
    ):
        pass
    with folders.RunLock(tmp_path):
        pass  # Free again.


def test_a_checkpoint_that_does_not_fit_is_described(tmp_path):
    saver = checkpoints.Checkpointer(tmp_path / "c")
    saver.save(1, {"agent": make_tree()}, {})
    saver.close()
    reader = checkpoints.Checkpointer(tmp_path / "c")
    words = r"layer/kernel is float32\[2, 3\] on disk and float32\[2, 4\] here"
    with pytest.raises(ValueError, match=words):
        reader.restore_newest({"agent": make_tree(4)})
    reader.close()


def test_tree_differences_count_what_they_do_not_tell():
    left = {str(i): np.zeros(i) for i in range(9)}
    right = {str(i): np.zeros(i + 1, np.int32) for i in range(9)}
    told = checkpoints.tree_differences(left, right)
    assert len(told) == 7 and told[-1] == "and 3 more differences"
    assert checkpoints.tree_differences(left, left) == []
    (missing,) = checkpoints.tree_differences({}, {"a": np.zeros(2)})
    assert missing == "a is absent on disk and float64[2] here"


# Pictures.


def test_a_gif_shows_each_picture_in_its_colours(tmp_path):
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    shown = [np.full((20, 16, 3), color, np.uint8) for color in colors]
    shown.append(np.concatenate([picture[:5] for picture in shown]))
    run_pictures.save_gif(tmp_path / "g.gif", shown)
    with Image.open(tmp_path / "g.gif") as gif:
        assert gif.n_frames == 4
        for index, color in enumerate(colors):
            gif.seek(index)
            pixel = np.array(gif.convert("RGB"))[10, 8]
            np.testing.assert_allclose(pixel, color, atol=12)
    with pytest.raises(ValueError, match="at least one"):
        run_pictures.save_gif(tmp_path / "h.gif", [])


def test_curves_are_drawn_from_metrics_files(tmp_path):
    learned = [types.Metric("loss_td", "-", "A loss.")]
    for name, columns in (
        ("p", metrics.pretrain_columns(learned)),
        ("f", metrics.finetune_columns(learned)),
    ):
        (tmp_path / name).mkdir()
        writer = metrics.MetricsWriter(tmp_path / name, columns)
        writer.write(dict.fromkeys(columns, 1.0) | {"agent_steps": 5})
        writer.close()
    run_pictures.save_learning_curves(
        tmp_path / "curves.png",
        title="aps on Pong",
        reference=None,
        pretrain_csv=tmp_path / "p" / "metrics.csv",
        finetune_csvs={"scratch": tmp_path / "f" / "metrics.csv"},
    )
    with Image.open(tmp_path / "curves.png") as picture:
        image = np.array(picture.convert("L"))
    assert image.shape[0] > 400 and np.std(image) > 5


# Resources.


def test_a_replay_larger_than_memory_is_refused_with_the_estimate():
    options = {"num_devices": 1, "is_copied": True, "option": "replay_size"}
    with pytest.raises(ValueError, match=r"needs about 2000\.7 GiB.*--replay_size"):
        machine.check_memory(1000 * 2**30, **options)  # Twice, and 0.7 GiB besides.
    with pytest.raises(ValueError, match="replays of 3 seeds need .*--num_seeds or --"):
        machine.check_memory(1000 * 2**30, **options, num_seeds=3)
    machine.check_memory(10**6, **options)


def write_files(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"


@pytest.mark.parametrize(
    "files, free, cores",
    [
        ({}, 8_000_000 * 1024, math.inf),
        # Version 2, limits on the group around the process's own.
        (
            {
                "proc/self/cgroup": "0::/slurm/job\n",
                "sys/fs/cgroup/slurm/memory.max": "5000\n",
                "sys/fs/cgroup/slurm/memory.current": "1500\n",
                "sys/fs/cgroup/slurm/job/memory.max": "max\n",
                "sys/fs/cgroup/slurm/job/memory.current": "1000\n",
                "sys/fs/cgroup/slurm/job/cpu.max": "max 100000\n",
                "sys/fs/cgroup/slurm/cpu.max": "50000 100000\n",
            },
            3500,
            0.5,
        ),
        # Version 1, in a container whose own group is the mount.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "9000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "25000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0,
            0.25,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, 8_000_000 * 1024, math.inf),
    ],
    ids=["none", "version 2", "version 1", "no quota"],
)
def test_limits_are_those_of_the_control_group(tmp_path, files, free, cores):
    write_files(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert machine.host_bytes(tmp_path) == free
    own = float(len(os.sched_getaffinity(0)))
    assert machine.usable_cores(tmp_path) == min(own, cores)


def test_threads_beyond_the_quota_are_warned_of(monkeypatch):
    monkeypatch.setattr(machine, "usable_cores", lambda: 1.5)
    said = []
    machine.check_cores(2, said.append)
    assert said == []
    machine.check_cores(3, said.append)
    (warning,) = said
    assert warning == (
        "3 emulator threads share 1.5 cores, the quota of this process: give "
        "--env_threads=2."
    )


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="Cannot write to /proc/self: "):
        machine.check_writable(pathlib.Path("/proc/self"))
    machine.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_or_warned_of(tmp_path, monkeypatch):
    def check(free):
        monkeypatch.setattr(
            machine.shutil,
            "disk_usage",
            lambda path: collections.namedtuple("Usage", "free")(free),
        )
        said = []
        machine.check_disk(
            tmp_path,
            fixed_bytes=3 * 2**20,
            replay_bytes=7000 * 2**20,
            kept=2,
            warn=said.append,
        )
        return said

    with pytest.raises(ValueError, match=r"takes at least 10\.0 MiB, and 9\.0 MiB are"):
        check(9 * 2**20)
    (warning,) = check(1000 * 2**20)
    assert "1000.0 MiB are free" in warning
    assert "3 checkpoints take up to 20.5 GiB" in warning
    assert check(3 * 7003 * 2**20) == []


def test_preflight_measures_and_predicts(tmp_path, capsys):
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"),
        game=fakes.PLANES,
        encoder="mlp",
        pretrain_frames=7_200_000,
    )
    checks = preflight.run_checks(
        recorders.make_runs(config, tmp_path / "new" / "run"),
        ["pretrain", "finetune"],
        seconds=0.05,
        constructor=fakes.PlanesPool,
    )
    assert not (tmp_path / "new").exists()
    assert {check.verdict for check in checks} == {"ok"}
    by_name = {check.name: check.found for check in checks}
    assert list(by_name) == [
        "devices",
        "cores",
        "memory, pretrain",
        "memory, finetune",
        "work directory",
        "disk, pretrain",
        "disk, finetune",
        "rate, pretrain",
        "rate, finetune",
    ]
    words = re.match(
        r"([\d,]+) frames/s over 0.05 s: 7,200,000 frames take ([\d.,]+) hours",
        by_name["rate, pretrain"],
    )
    rate, hours = (float(word.replace(",", "")) for word in words.groups())
    np.testing.assert_allclose(hours, 2000 / rate, atol=0.006, rtol=0.01)
    preflight.print_table(checks)
    assert len(capsys.readouterr().out.splitlines()) < 40


def test_preflight_says_what_would_end_the_run(tmp_path):
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"), replay_size=2 * 10**9
    )
    runs = recorders.make_runs(config, tmp_path)
    checks = preflight.run_checks(runs, ["pretrain"], seconds=1e9)
    failed = [check for check in checks if check.verdict == "failed"]
    assert failed[0].name == "memory, pretrain"
    assert "--replay_size" in failed[0].found
    # Nothing is measured on a machine that cannot do it.
    assert not any(check.name.startswith("rate") for check in checks)


def test_preflight_says_what_each_device_holds(tmp_path):
    config = config_lib.replace_options(config_lib.preset_config("gpu"), num_devices=8)
    runs = recorders.make_runs(config, tmp_path)
    checks = preflight.run_checks(runs, ["pretrain"], seconds=1e9)
    found = {check.name: check for check in checks}
    # 1,000,000 // 128 steps of each of 128 / 8 environments, 7,183 bytes each:
    # a frame of 7,056 takes a row of 7,168.
    assert found["each device, pretrain"].found == (
        "16 environments and their replay (856.2 MiB); 128 targets and 128 particles "
        "of a batch; the whole agent"
    )
    assert found["devices"].verdict == "failed"
    assert "num_devices is 8, and this machine has 1" in found["devices"].found


def test_memory_there_is_what_the_kernel_says():
    there = machine.available_bytes()
    assert 2**28 < there < 2**45


def test_no_accelerator_is_said_plainly():
    with pytest.raises(ValueError, match="sees no GPU or TPU"):
        machine.check_accelerator()
