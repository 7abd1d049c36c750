"""Tests of experiments.benchmark: its arithmetic, and every row in its smallest size."""

import contextlib
import functools
import io
import itertools
import json
import math
import types

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from aps_jax import config as config_lib
from aps_jax.envs import atari
from aps_jax.runs import machine
from experiments import (
    bench_loop,
    bench_parts,
    bench_scaling,
    bench_seeds,
    bench_startup,
    bench_table,
    benchmark,
    common_flags,
)


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

    monkeypatch.setattr(bench_table.time, "perf_counter", lambda: now[0])
    turns = bench_table.take_turns(
        {"a": make("a", 2.0), "b": make("b", 6.0)}, repetitions=3, work={"b": 3.0}
    )
    assert order == ["a", "b"] * 4  # The first turns are not timed.
    assert turns.seconds == {"a": [2.0] * 3, "b": [2.0] * 3}
    assert turns.rate("a") == 0.5


def test_ratios_are_medians_of_the_ratios_within_a_repetition():
    # A machine that is ten times slower in the second repetition changes nothing.
    turns = bench_table.Turns({"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 3.0]})
    assert turns.ratio(lambda t: t["b"] / t["a"]) == 2.0
    assert turns.median("a") == 1.0


@pytest.mark.parametrize(
    "fields, is_met",
    [
        (bench_table.at_least(0.9, 0.9), True),
        (bench_table.at_least(0.89, 0.9), False),
        (bench_table.at_most(1.06, 1.06), True),
        (bench_table.at_most(1.07, 1.06), False),
        (bench_table.at_least(None, 1.0), None),
    ],
)
def test_goals(fields, is_met):
    assert fields["is_met"] is is_met


def test_the_table_says_what_was_measured_and_what_was_not():
    rows = [
        bench_table.Row(
            "full",
            "ours",
            1234.5,
            1000.0,
            "frames/s",
            **bench_table.at_least(1.2345, 2),
        ),
        bench_table.Row("encoder", "all", note="PyTorch is not installed"),
    ]
    machine = bench_table.describe_machine() | {"commit": "abc", "size": "full"}
    head, *_, first, second = bench_table.to_markdown(rows, machine).splitlines()
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
    assert len(bench_table.to_text(rows).splitlines()) == 3


class FakePlayer:
    """Stands for a process of the row of seeds."""

    def __init__(self, started, options):
        started.append(options)
        seconds = "4.0" if "--bench_seeds=2" in options else "3.0"
        self._answers = itertools.chain(["ready"], itertools.repeat(seconds))
        self._is_asked = True

    def begin(self):
        self._is_asked = True

    def answer(self):
        assert self._is_asked
        self._is_asked = False
        return next(self._answers)

    def close(self):
        pass


def test_a_process_of_the_row_of_seeds_plays_a_turn_for_each_line(monkeypatch, capsys):
    monkeypatch.setattr(bench_seeds.sys, "stdin", ["\n", "\n"])
    options = {"preset": "cpu", "bench_seeds": 2, "bench_iterations": 1}
    with flagsaver.flagsaver(**options, **dict(bench_loop.SMOKE.options)):
        bench_seeds.main(["bench_seeds"])
    ready, *seconds = capsys.readouterr().out.split()
    assert ready == "ready" and len(seconds) == 2
    assert all(float(value) > 0 for value in seconds)


def test_every_row_runs(tmp_path, monkeypatch):
    started = []
    player = functools.partial(FakePlayer, started)
    monkeypatch.setattr(bench_seeds, "_Player", player)
    starts = iter([9.0, 3.0])
    monkeypatch.setattr(bench_startup, "measure", lambda *_: next(starts))
    asked = []
    monkeypatch.setattr(
        bench_scaling,
        "process",
        lambda count, _: contextlib.nullcontext(lambda *words: asked.append(count)),
    )
    with flagsaver.flagsaver(size="smoke", workdir=str(tmp_path)):
        benchmark.main(["benchmark"])
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["row"] for row in result["rows"]} == set(benchmark.ROWS)
    assert {"cpu", "cores", "device", "jax", "commit"} <= set(result["machine"])
    by_case = {row["case"]: row for row in result["rows"]}
    for row in result["rows"]:
        assert row["ratio"] is None or math.isfinite(row["ratio"]), row
    # What does not depend on the clock holds in the smallest size too.
    assert by_case["bytes per step / bytes of its frame"]["is_met"]
    assert by_case["cold / with the compilation cache"]["ratio"] == 3.0
    # Turns of 4 s at once, of 3 s in each of two processes.
    beside = by_case["2 seeds at once / 2 processes side by side"]
    after = by_case["2 seeds at once / 2 processes one after another"]
    assert (beside["ratio"], after["ratio"]) == (0.75, 1.5)
    assert beside["measured"] == 2 * 3 * 4 / 4.0  # seeds, iterations, environments
    assert [("--bench_seeds=2" in words) for words in started] == [1, 0, 0]
    assert "--seed=1" in started[2]
    for row in result["rows"]:
        if row["row"] in ("recompilation", "knn_accuracy", "knn_memory"):
            assert row["is_met"] is not False, row
    assert "scaling" in (tmp_path / "benchmark.md").read_text()
    assert set(asked) == set(bench_loop.SMOKE.device_counts)


def test_rates_of_devices_are_compared_with_a_share_of_the_cores():
    seconds = {}
    for case in bench_scaling.CASES:
        seconds |= {f"loop {case} 1": [0.5], f"learn {case} 1": [2.0]}
        seconds |= {f"loop {case} 4": [1.0], f"learn {case} 4": [4.0]}
    rows = bench_scaling.table_of_devices(bench_table.Turns(seconds), (1, 4))
    found = {row.case: (row.measured, row.limit, row.ratio) for row in rows}
    words = "same global batch, {}: each of {} / its share of one alone"
    # 2 agent steps a second on one device, so 0.5 on each of 4 at the same speed.
    assert found[words.format("loop", 1)] == (2.0, 2.0, 1.0)
    assert found[words.format("loop", 4)] == (0.25, 0.5, 0.5)
    assert found[words.format("learn", 4)] == (0.25, 0.5, 0.5)
    # 4 times the batch, in twice the time.
    words = words.replace("same global batch", "same batch per device")
    assert found[words.format("loop", 4)] == (0.25, 0.5, 0.5)
    assert found[words.format("learn", 4)] == (0.25, 0.125, 2.0)


def test_a_process_of_devices_does_what_it_is_asked(monkeypatch):
    done = []
    monkeypatch.setattr(bench_loop, "started", lambda config, _: config)
    monkeypatch.setattr(
        bench_loop, "play", lambda c, n, learns: done.append((c.pretrain.num_envs, n))
    )
    monkeypatch.setattr(
        bench_loop, "learn_alone", lambda c, n: done.append((c.learner.batch_size, n))
    )
    config = config_lib.replace_options(
        config_lib.preset_config("cpu"), num_devices=2, num_envs=4, batch_size=16
    )
    answers = io.StringIO()
    requests = "loop global 3\nloop each 5\nlearn global 1\nlearn each 2\n"
    bench_scaling.serve(config, io.StringIO(requests), answers)
    assert done == [(4, 3), (8, 5), (16, 1), (32, 2)]
    assert answers.getvalue() == "done\n" * 4


@pytest.mark.parametrize("answer, is_well", [("done\n", True), ("", False)])
def test_a_process_of_devices_is_started_and_asked(monkeypatch, answer, is_well):
    seen = {}

    @contextlib.contextmanager
    def start(command, *, env, **_):
        seen.update(command=command, env=env, requests=io.StringIO())
        yield types.SimpleNamespace(
            stdin=seen["requests"], stdout=io.StringIO(answer), poll=lambda: 1
        )

    monkeypatch.setattr(bench_scaling.subprocess, "Popen", start)
    with bench_scaling.process(2, bench_loop.SMOKE) as ask:
        if is_well:
            ask("loop", "each", 3)
            assert seen["requests"].getvalue() == "loop each 3\n"
        else:
            with pytest.raises(RuntimeError, match="--num_devices=2.* ended"):
                ask("loop", "each", 3)
    assert "--num_devices=2" in seen["command"]
    assert "--num_envs=4" in seen["command"]
    # A thread for each device: more of them than are used would slow one device down.
    assert seen["env"]["XLA_FLAGS"].endswith("_device_count=2")


def test_without_pytorch_its_rows_say_so(monkeypatch):
    monkeypatch.setattr(bench_parts.bench_encoders, "torch", None)
    (row,) = bench_parts.encoder_rows(bench_loop.SMOKE)
    assert row.is_met is None and "not installed" in row.note
    rows = bench_parts.knn_rows(bench_loop.SMOKE)
    compared = [row for row in rows if "PyTorch" in row.case]
    assert compared and all(row.ratio is None for row in compared)
    assert all("not installed" in row.note for row in compared)


def test_unknown_rows_are_refused(tmp_path):
    with (
        flagsaver.flagsaver(rows=["speed"], workdir=str(tmp_path)),
        pytest.raises(ValueError, match=r"acting, full.*got \['speed'\]"),
    ):
        benchmark.main(["benchmark"])


def test_a_start_is_measured_in_a_process_of_its_own(monkeypatch):
    seen = {}

    def run(command, *, env, **_):
        seen.update(command=command, env=env)
        return types.SimpleNamespace(
            stdout="x\nseconds to the first update: 12.500\n", stderr=""
        )

    monkeypatch.setattr(bench_startup.subprocess, "run", run)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert bench_startup.measure("folder", [("num_envs", 4)], "cpu") == 12.5
    assert "--compilation_cache=folder" in seen["command"]
    assert "--num_envs=4" in seen["command"]
    assert "JAX_COMPILATION_CACHE_DIR" not in seen["env"]

    def fail(command, **_):
        return types.SimpleNamespace(stdout="", stderr="no memory")

    monkeypatch.setattr(bench_startup.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        bench_startup.measure("folder", [], "cpu")


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
    monkeypatch.setattr(machine, "_cpu_flags", lambda: "mmx")
    assert machine.cache_folder() != here
    assert machine.cache_folder().parent == here.parent


def test_the_jitted_step_is_that_of_the_pool():
    def make():
        return atari.AtariPool("Pong", 2, seeds=[3, 4], num_threads=1, max_frames=80)

    pool, twin = make(), make()
    pool.reset()
    twin.reset()
    handle, step = twin.make_jitted_step()
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
