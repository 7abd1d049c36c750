"""Tests of aps_jax.runs.metrics: rows on disk, and as TensorBoard shows them."""

import math
import os
import pathlib
import shutil

import pytest
from faults import harness

from aps_jax import agents
from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.runs import metrics

COLUMNS = ("agent_steps", "frames", "loss_td")


def write_rows(folder, steps, **options):
    writer = metrics.MetricsWriter(folder, COLUMNS, **options)
    for step in steps:
        writer.write({"agent_steps": step, "frames": 4 * step, "loss_td": step / 7})
    writer.close()


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
    writer = metrics.MetricsWriter(tmp_path, COLUMNS)
    writer.write({"agent_steps": 5})
    columns = metrics.read_metrics(tmp_path / "metrics.csv")
    assert columns["agent_steps"] == [5.0]
    assert math.isnan(columns["loss_td"][0])
    with pytest.raises(ValueError, match="No such columns: .*'speed'"):
        writer.write({"agent_steps": 6, "speed": 1.0})
    writer.close()


def test_rows_that_could_not_be_written_come_with_the_next(tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    for place in (folder, whole):
        place.mkdir()
    write_rows(whole, [10, 20, 30, 40, 50])
    writer = metrics.MetricsWriter(folder, COLUMNS)
    row = {
        step: {"agent_steps": step, "frames": 4 * step, "loss_td": step / 7}
        for step in range(10, 60, 10)
    }
    writer.write(row[10])
    with (folder / "metrics.csv").open("a") as file:
        file.write("20,8")  # A write that a full disk cut short.
    os.symlink("/dev/full", folder / "metrics.csv.tmp")
    for step in (20, 30):
        with pytest.raises(OSError, match="No space left on device"):
            writer.write(row[step])
    (folder / "metrics.csv.tmp").unlink()
    writer.write(row[40])
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        writer.write(row[50])
    folder.mkdir()
    writer.sync()
    writer.close()
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert harness.read_events(folder) == harness.read_events(whole)


def test_events_of_a_resumed_run_are_those_of_a_whole_one(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    write_rows(tmp_path / "whole", [10, 20, 20, 30, 40])
    write_rows(tmp_path / "parts", [10, 20, 20, 30])
    # The second row of step 20 came after the checkpoint.
    write_rows(tmp_path / "parts", [20, 30, 40], kept_rows=2)
    shown = harness.read_events(tmp_path / "parts")
    assert shown == harness.read_events(tmp_path / "whole")
    assert [step for step, _ in shown["frames"]] == [10, 20, 20, 30, 40]


def test_a_file_of_other_columns_is_refused(tmp_path):
    write_rows(tmp_path, [10])
    with pytest.raises(ValueError, match="has columns"):
        metrics.MetricsWriter(tmp_path, ("agent_steps",), kept_rows=1)


def test_events_are_written_for_tensorboard(tmp_path):
    write_rows(tmp_path, [10, 20])
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"loss_td" in events.read_bytes()


@pytest.mark.parametrize("name", agents.AGENTS)
def test_every_metric_is_declared_once(name):
    agent = config_lib.preset_config("smoke", name).make_agent(2, atari.OBSERVATION)
    learned = agent.finetune.learner.metrics
    columns = metrics.finetune_columns(learned)
    assert columns[0] == "agent_steps" and len(set(columns)) == len(columns)
    assert {metric.name for metric in (*metrics.COUNTERS, *learned)} < set(columns)
    if agent.pretrain is not None:
        columns = metrics.pretrain_columns(agent.pretrain.learner.metrics)
        assert columns[0] == "agent_steps" and len(set(columns)) == len(columns)


def test_a_relative_folder_named_like_a_protocol_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path("gs:[a b]é")
    folder.mkdir()
    write_rows(folder, [10])
    assert harness.read_events(folder)["frames"] == [[10, 40.0]]
