"""Tests of the benchmark: its arithmetic, and every row in its smallest size."""

import io
import json
import math

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.runs import machine
from experiments import benchmark, common_flags
from experiments.benchmark import encoders, parts, setup, table, workers


@pytest.fixture(autouse=True)
def parsed_flags():
    """Lets the tests read flags, each at its default unless a test sets it."""
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        yield


def test_things_take_turns_and_are_timed_per_unit_of_work(monkeypatch):
    now, order = [0.0], []

    def make(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(table.time, "perf_counter", lambda: now[0])
    turns = table.take_turns(
        {"a": make("a", 2.0), "b": make("b", 6.0)}, repetitions=3, work={"b": 3.0}
    )
    assert order == ["a", "b"] * 4  # The first turns are not timed.
    assert turns.seconds == {"a": [2.0] * 3, "b": [2.0] * 3}


def test_a_turn_lasts_as_many_calls_as_fill_its_seconds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(table.time, "perf_counter", lambda: now[0])

    def step():
        now[0] += 0.25

    # Four calls fill a second: 8 images each are 32 a second.
    turns = table.take_turns({"a": step}, repetitions=2, work={"a": 8.0}, seconds=1.0)
    assert now[0] == 0.25 + 2 * 1.0
    assert turns.seconds == {"a": [0.25 / 8] * 2}


def test_ratios_are_medians_of_the_ratios_within_a_repetition():
    # A machine that is ten times slower in the second repetition changes nothing.
    turns = table.Turns({"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 3.0]})
    assert turns.ratio(lambda t: t["b"] / t["a"]) == 2.0
    assert turns.median("a") == 1.0
    row = turns.rates("full", "case", "a", "b", "frames/s", scale=4.0, goal=2.5)
    assert row[:6] == ("full", "case", 4.0, 4.0 / 3.0, "frames/s", 2.0)
    assert row.is_met is False
    row = turns.times("full", "case", "b", "a", "ms", scale=1e3)
    assert row[:6] == ("full", "case", 3e3, 1e3, "ms", 2.0)
    assert row.is_met is None


@pytest.mark.parametrize(
    "fields, is_met",
    [
        (table.at_least(0.9, 0.9), True),
        (table.at_least(0.89, 0.9), False),
        (table.at_most(1.06, 1.06), True),
        (table.at_most(1.07, 1.06), False),
        (table.at_least(None, 1.0), None),
    ],
)
def test_goals(fields, is_met):
    assert fields["is_met"] is is_met


def test_the_table_says_what_was_measured_and_what_was_not():
    rows = [
        table.Row(
            "full",
            "ours",
            1234.5,
            1000.0,
            "frames/s",
            **table.at_least(1.2345, 2),
        ),
        table.Row("encoder", "all", note="PyTorch is not installed"),
    ]
    machine = table.describe_machine() | {"commit": "abc", "size": "full"}
    head, *_, first, second = table.to_markdown(rows, machine).splitlines()
    assert "abc" in head
    assert first.strip("| ").split(" | ") == [
        "full",
        "ours",
        "1,234",
        "1,000",
        "frames/s",
        "1.23",
        "at least 2",
        "**no**",
    ]
    assert "PyTorch is not installed" in second


@pytest.fixture(name="started", scope="module")
def _started():
    """One real process that does the work of all, and what each was started with."""
    worker = workers.Worker(setup.SMOKE, num_seeds=0, num_devices=1, seed=0)
    started = []

    class Shared:
        seconds_to_first_update = worker.seconds_to_first_update
        begin, wait, do = worker.begin, worker.wait, worker.do

        def __init__(self, size, **options):
            assert size is setup.SMOKE
            started.append(options)

        def close(self):
            pass

    yield Shared, started
    worker.close()


def test_every_row_runs(tmp_path, monkeypatch, started):
    shared, options = started
    monkeypatch.setattr(workers, "Worker", shared)
    with flagsaver.flagsaver(size="smoke", workdir=str(tmp_path)):
        benchmark.main(["benchmark"])
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["row"] for row in result["rows"]} == set(benchmark.ROWS)
    assert {"cpu", "cores", "device", "jax", "commit"} <= set(result["machine"])
    for row in result["rows"]:
        assert row["ratio"] is None or math.isfinite(row["ratio"]), row
    cases = {row["case"]: row for row in result["rows"]}
    # The same process took both turns.
    assert cases["cold / with the compilation cache"]["ratio"] == 1.0
    assert 0.1 < cases["cold / with the compilation cache"]["measured"] < 600
    assert "scaling" in (tmp_path / "benchmark.md").read_text()
    assert [o.get("num_seeds", 0) for o in options if "compilation_cache" not in o] == [
        *(0, 0, 2),
        *(0 for _ in setup.SMOKE.device_counts),
    ]
    caches = [o["compilation_cache"] for o in options if "compilation_cache" in o]
    assert len(caches) == 2 and len(set(caches)) == 1


def test_work_of_more_devices_is_counted_in_updates_of_one(monkeypatch):
    asked = []

    class Worker:
        def __init__(self, size, *, num_devices, **_):
            self.num_devices = num_devices

        def do(self, thing, count, case):
            asked.append((self.num_devices, thing, count, case))

        def close(self):
            pass

    seen = {}

    def take_turns(things, *, repetitions, work):
        seen.update(work)
        for thing in things.values():
            thing()
        return table.Turns({name: [1.0] for name in things})

    monkeypatch.setattr(workers, "Worker", Worker)
    monkeypatch.setattr(workers, "take_turns", take_turns)
    rows = workers.devices_rows(setup.SMOKE)
    # 3 iterations of 4 environments; with the batch of each device kept, of 8.
    assert seen["play", "global", 2] == 12 and seen["play", "each", 2] == 24
    assert seen["learn", "global", 2] == 1 and seen["learn", "each", 2] == 2
    assert (2, "play", 3, "each") in asked and (1, "learn", 1, "global") in asked
    assert len(rows) == 8


def test_a_case_of_devices_keeps_what_it_says():
    config = config_lib.replace_options(
        config_lib.preset_config("cpu"), num_devices=2, num_envs=4, batch_size=16
    )
    assert workers.config_of("global", config) is config
    each = workers.config_of("each", config)
    assert (each.pretrain.num_envs, each.learner.batch_size) == (8, 32)


def test_a_process_does_what_it_is_asked(monkeypatch):
    done = []

    class Session:
        def __init__(self, config, *, num_seeds):
            self.envs = config.pretrain.num_envs
            done.append(("start", self.envs, num_seeds))

        def play(self, count):
            done.append(("play", self.envs, count))

        def learn(self, count):
            done.append(("learn", self.envs, count))

    monkeypatch.setattr(setup, "Setup", Session)
    options = {"num_devices": 2, "num_envs": 4}
    config = config_lib.replace_options(config_lib.preset_config("cpu"), **options)
    answers = io.StringIO()
    requests = "play global 3\nplay each 5\nlearn global 1\n"
    workers.serve(config, 0, io.StringIO(requests), answers)
    assert done == [
        ("start", 4, 0),
        ("play", 4, 3),
        ("start", 8, 0),
        ("play", 8, 5),
        ("learn", 4, 1),
    ]
    seconds, *rest = answers.getvalue().split()
    assert float(seconds) > 0 and rest == ["done"] * 3


def test_a_process_that_ends_too_early_is_named(monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="--serve=2.* ended too early"):
        workers.Worker(setup.SMOKE, num_seeds=2)


def test_without_pytorch_its_rows_say_so(monkeypatch):
    monkeypatch.setattr(encoders, "torch", lambda: None)
    (row,) = parts.encoder_rows(setup.SMOKE)
    assert row.is_met is None and "not installed" in row.note
    rows = parts.knn_rows(setup.SMOKE)
    compared = [row for row in rows if "PyTorch" in row.case]
    assert compared and all(row.ratio is None for row in compared)
    assert all("not installed" in row.note for row in compared)


def test_unknown_rows_are_refused(tmp_path):
    with (
        flagsaver.flagsaver(rows=["speed"], workdir=str(tmp_path)),
        pytest.raises(ValueError, match=r"acting, full.*got \['speed'\]"),
    ):
        benchmark.main(["benchmark"])


@pytest.mark.parametrize(
    "flag, variable, expected",
    [
        ("auto", None, "home"),
        ("auto", "there", None),  # JAX reads the variable by itself.
        ("mine", "there", "mine"),
        ("", None, None),
    ],
)
def test_compiled_programs_are_kept_where_the_flag_says(
    monkeypatch, tmp_path, flag, variable, expected
):
    settings = {}
    monkeypatch.setattr(common_flags.jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    if variable is None:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    else:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    with flagsaver.flagsaver(compilation_cache=flag):
        common_flags.use_compilation_cache()
    folder = settings.get("jax_compilation_cache_dir")
    if expected == "home":
        assert folder.startswith(str(tmp_path / "home" / "aps_jax"))
    else:
        assert folder == expected


def test_cpus_of_other_kinds_have_other_cache_folders(monkeypatch):
    here = machine.cache_folder()
    assert here == machine.cache_folder()
    monkeypatch.setattr(machine, "cpu_fact", lambda *names: "mmx")
    assert machine.cache_folder() != here
    assert machine.cache_folder().parent == here.parent


def test_the_jitted_step_is_that_of_the_pool():
    def make():
        return atari.AtariPool("Pong", 2, seeds=[3, 4], num_threads=1, max_frames=80)

    pool, twin = make(), make()
    pool.reset()
    twin.reset()
    handle, step = setup.make_jitted_step(twin)
    step = jax.jit(step)
    rng = np.random.default_rng(0)
    is_first = []
    for _ in range(45):  # Over two time limits, with the resets behind them.
        actions = rng.integers(0, pool.num_actions, 2).astype(np.int32)
        pool.send(actions)
        expected = pool.recv()
        handle, found = step(handle, actions)
        jax.tree.map(np.testing.assert_array_equal, expected, jax.device_get(found))
        is_first.append(expected.is_first)
    assert 0 < np.sum(is_first) < 90
    pool.close()
    twin.close()
