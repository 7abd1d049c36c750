"""Tests of the benchmark: its arithmetic, and every row in its smallest size."""

import json
import math
import types

import pytest
from absl import flags
from absl.testing import flagsaver

from aps_jax.runs import machine
from experiments import benchmark, common_flags
from experiments.benchmark import setup, startup, table


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
    ],
)
def test_goals(fields, is_met):
    assert fields["is_met"] is is_met


def test_the_table_says_what_was_measured_and_what_it_should_be():
    rows = [
        table.Row(
            "full",
            "ours",
            1234.5,
            1000.0,
            "frames/s",
            **table.at_least(1.2345, 2),
        ),
        table.Row("acting", "theirs", 0.5, 2.0, "s", 0.25),
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
    assert second.endswith("| 0.5 | 2 | s | 0.25 | - | - |")


def test_every_row_runs(tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        started.append(command)

    monkeypatch.setattr(
        startup, "subprocess", types.SimpleNamespace(run=run, DEVNULL=None)
    )
    with flagsaver.flagsaver(size="smoke", workdir=str(tmp_path)):
        benchmark.main(["benchmark"])
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert {row["row"] for row in result["rows"]} == set(benchmark.ROWS)
    assert {"cpu", "cores", "device", "jax", "commit"} <= set(result["machine"])
    for row in result["rows"]:
        assert math.isfinite(row["ratio"]), row
    assert "scaling" in (tmp_path / "benchmark.md").read_text()
    # A cold start and one with the cache of the first.
    cold, cached = ({w for w in words if "cache=" in w} for words in started)
    assert cold == cached


def test_a_start_makes_one_update(tmp_path):
    """A real process, with the smallest size."""
    startup._pretrain(setup.SMOKE, tmp_path / "run", str(tmp_path / "cache"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["updates"] == 1
    assert list((tmp_path / "cache").iterdir())


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
