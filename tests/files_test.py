"""Tests of what a run writes: metrics, folders, checkpoints, pictures, progress."""

import io
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aps_jax import checkpoint, metrics, pictures, progress, resources, rundir
from aps_jax import config as config_lib

COLUMNS = ("agent_steps", "frames", "loss_td")


def write_rows(folder, steps, **options):
    writer = metrics.MetricsWriter(folder, COLUMNS, **options)
    for step in steps:
        writer.write({"agent_steps": step, "frames": 4 * step, "loss_td": step / 7})
    writer.close()


# Metrics.


def test_a_resumed_metrics_file_equals_an_uninterrupted_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    write_rows(tmp_path / "whole", [10, 20, 30, 40])
    write_rows(tmp_path / "parts", [10, 20, 30])
    with (tmp_path / "parts" / "metrics.csv").open("a") as file:
        file.write("40,16")  # A crash in the middle of a row.
    write_rows(tmp_path / "parts", [30, 40], kept_rows=2)
    assert (tmp_path / "parts" / "metrics.csv").read_bytes() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_bytes()


def test_rows_are_on_disk_as_soon_as_written_and_lack_nothing(tmp_path):
    writer = metrics.MetricsWriter(tmp_path, COLUMNS, tensorboard=False)
    writer.write({"agent_steps": 5})
    columns = metrics.read_metrics(tmp_path / "metrics.csv")
    assert columns["agent_steps"] == [5.0]
    assert math.isnan(columns["loss_td"][0])
    with pytest.raises(ValueError, match="No such columns: .*'speed'"):
        writer.write({"agent_steps": 6, "speed": 1.0})


def test_a_file_of_other_columns_is_refused(tmp_path):
    write_rows(tmp_path, [10])
    with pytest.raises(ValueError, match="has columns"):
        metrics.MetricsWriter(tmp_path, ("agent_steps",), kept_rows=1)


def test_events_are_written_for_tensorboard(tmp_path):
    write_rows(tmp_path, [10, 20])
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"loss_td" in events.read_bytes()


PLACE = {"replay_index": jnp.int32(0), "replay_is_full": jnp.bool_(False)}


def test_sums_average_and_reject_other_names():
    running = metrics.init_sums(["a", "b"])
    assert all(math.isnan(value) for value in metrics.means(running).values())
    for a, b in ((1.0, 0.0), (2.0, 4.0)):
        running = jax.jit(metrics.add_to_sums)(
            running, {"a": jnp.float32(a), "b": jnp.float32(b)}, **PLACE
        )
    assert metrics.means(running) == {"a": 1.5, "b": 2.0}
    with pytest.raises(ValueError, match="Expected metrics"):
        metrics.add_to_sums(running, {"a": jnp.float32(1)}, **PLACE)


def test_every_metric_is_declared_once():
    names = [metric.name for metric in metrics.ALL]
    assert len(set(names)) == len(names)
    assert set(metrics.PRETRAIN_COLUMNS) | set(metrics.FINETUNE_COLUMNS) == set(names)


# Folders.


def test_json_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "x.json"
    rundir.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        rundir.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_broken_config_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        rundir.read_run(tmp_path)


def test_a_config_of_another_schema_is_refused(tmp_path):
    rundir.write_json(tmp_path / "config.json", {"schema": 9})
    with pytest.raises(ValueError, match="schema 9, this version reads 1"):
        rundir.read_run(tmp_path)


def test_a_run_knows_its_versions(tmp_path):
    config = config_lib.Config()
    assert not rundir.open_run(tmp_path / "r", stage="pretrain", config=config)
    facts, found = rundir.read_run(tmp_path / "r")
    assert found == config
    assert facts["versions"]["jax"] == jax.__version__
    assert rundir.open_run(tmp_path / "r", stage="pretrain", config=config)


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        rundir.open_run(tmp_path / "f", stage="pretrain", config=config_lib.Config())


# Checkpoints.


def make_tree(width=3):
    return {"layer": {"kernel": jnp.ones((2, width)), "bias": jnp.zeros(width)}}


def test_checkpoints_come_back_bit_for_bit(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path / "c")
    tree = {"x": jax.random.normal(jax.random.key(0), (5,)), "n": jnp.int32(3)}
    for number in (1, 2, 3):
        saver.save(
            number,
            {"agent": tree, "loop": {"loop": jnp.arange(number)}},
            {"agent_steps": number},
        )
    saver.close()
    reader = checkpoint.Checkpointer(tmp_path / "c")
    facts, parts = reader.restore_newest(
        {
            "agent": jax.eval_shape(lambda: tree),
            "loop": {"loop": jnp.zeros(3, jnp.int32)},
        }
    )
    reader.close()
    assert facts["agent_steps"] == 3
    np.testing.assert_array_equal(parts["agent"]["x"], tree["x"])
    assert parts["agent"]["n"] == 3
    np.testing.assert_array_equal(parts["loop"]["loop"], [0, 1, 2])


def test_no_checkpoint_is_nothing(tmp_path):
    reader = checkpoint.Checkpointer(tmp_path / "c")
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
    saver = checkpoint.Checkpointer(tmp_path / "c")
    for number in (1, 2):
        saver.save(number, {"agent": {"x": jnp.arange(1000.0) * number}}, {})
    saver.close()
    damage(tmp_path / "c" / "2", kind)
    reader = checkpoint.Checkpointer(tmp_path / "c")
    template = {"agent": {"x": jnp.zeros(1000)}}
    _, parts = reader.restore_newest(template, set_damaged_aside=True)
    np.testing.assert_array_equal(parts["agent"]["x"], np.arange(1000.0))
    assert str(tmp_path / "c" / "2") in caplog.text
    # Its number is free again, and what is left of it is kept.
    assert (tmp_path / "damaged_checkpoint_2").is_dir()
    reader.save(2, {"agent": {"x": jnp.ones(1000)}}, {})
    reader.close()
    again = checkpoint.Checkpointer(tmp_path / "c")
    np.testing.assert_array_equal(again.restore_newest(template)[1]["agent"]["x"], 1.0)
    damage(tmp_path / "c" / "1", kind)
    damage(tmp_path / "c" / "2", kind)
    with pytest.raises(ValueError, match="None of the checkpoints in"):
        again.restore_newest(template)
    again.close()


def test_a_second_process_is_kept_out_of_a_folder(tmp_path):
    rundir.write_json(tmp_path / "config.json", {})
    with (
        rundir.RunLock(tmp_path),
        pytest.raises(ValueError, match=f"in use by another.*process {os.getpid()} on"),
        rundir.RunLock(tmp_path),
    ):
        pass
    with rundir.RunLock(tmp_path):
        pass  # Free again.


def test_a_checkpoint_that_does_not_fit_is_described(tmp_path):
    saver = checkpoint.Checkpointer(tmp_path / "c")
    saver.save(1, {"agent": make_tree()}, {})
    saver.close()
    reader = checkpoint.Checkpointer(tmp_path / "c")
    words = r"layer/kernel is float32\[2, 3\] on disk and float32\[2, 4\] here"
    with pytest.raises(ValueError, match=words):
        reader.restore_newest({"agent": make_tree(4)})
    reader.close()


def test_tree_differences_count_what_they_do_not_tell():
    left = {str(i): np.zeros(i) for i in range(9)}
    right = {str(i): np.zeros(i + 1, np.int32) for i in range(9)}
    told = checkpoint.tree_differences(left, right)
    assert len(told) == 7 and told[-1] == "and 3 more differences"
    assert checkpoint.tree_differences(left, left) == []
    (missing,) = checkpoint.tree_differences({}, {"a": np.zeros(2)})
    assert missing == "a is absent on disk and float64[2] here"


# Pictures and progress.


def test_a_gif_shows_each_picture_in_its_colours(tmp_path):
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    shown = [np.full((20, 16, 3), color, np.uint8) for color in colors]
    shown.append(np.concatenate([picture[:5] for picture in shown]))
    pictures.save_gif(tmp_path / "g.gif", shown)
    with Image.open(tmp_path / "g.gif") as gif:
        assert gif.n_frames == 4
        for index, color in enumerate(colors):
            gif.seek(index)
            pixel = np.array(gif.convert("RGB"))[10, 8]
            np.testing.assert_allclose(pixel, color, atol=12)
    with pytest.raises(ValueError, match="at least one"):
        pictures.save_gif(tmp_path / "h.gif", [])


def test_curves_are_drawn_from_metrics_files(tmp_path):
    for name, columns in (
        ("p", metrics.PRETRAIN_COLUMNS),
        ("f", metrics.FINETUNE_COLUMNS),
    ):
        (tmp_path / name).mkdir()
        writer = metrics.MetricsWriter(tmp_path / name, columns, tensorboard=False)
        writer.write(dict.fromkeys(columns, 1.0) | {"agent_steps": 5})
    pictures.save_learning_curves(
        tmp_path / "curves.png",
        game="Pong",
        pretrain_csv=tmp_path / "p" / "metrics.csv",
        finetune_csvs={"scratch": tmp_path / "f" / "metrics.csv"},
    )
    with Image.open(tmp_path / "curves.png") as picture:
        image = np.array(picture.convert("L"))
    assert image.shape[0] > 400 and np.std(image) > 5


def test_progress_says_phase_frames_rate_eta_and_return(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    shown = progress.Progress(stream)
    shown.start("pretrain", total=1000)
    clock[0] += 5.0
    shown.tick(100)  # Too early for a line in a file.
    clock[0] += 15.0
    shown.tick(400, last_return=-20.5)
    assert stream.getvalue().split("\n")[0] == (
        "pretrain: 400 of 1,000 frames, 20 frames/s, ETA 30s, last return -20.5"
    )


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (59.6, "1m00s"), (3725, "1h02m"), (math.inf, "unknown")],
)
def test_durations_are_written_for_people(seconds, text):
    assert progress.duration(seconds) == text


# Resources.


def test_a_replay_larger_than_memory_is_refused_with_the_estimate():
    huge = config_lib.replace_options(config_lib.Config(), replay_size=10**10)
    with pytest.raises(ValueError, match=r"needs about 13\d{4}\.\d GiB.*--replay_size"):
        resources.check_memory(huge, is_pretraining=True)
    resources.check_memory(config_lib.preset_config("smoke"), is_pretraining=False)


def test_memory_there_is_what_the_kernel_says():
    there = resources.available_bytes()
    assert 2**28 < there < 2**45


def test_no_accelerator_is_said_plainly():
    with pytest.raises(ValueError, match="sees no GPU or TPU"):
        resources.check_accelerator()
