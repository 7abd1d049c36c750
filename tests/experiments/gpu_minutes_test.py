"""Tests of experiments.gpu_minutes and its checks: clock, files, verdicts."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments import gpu_checks, gpu_minutes

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv))"


def part(name, tmp_path, code, seconds=60.0, **options):
    path = tmp_path / name
    words = ("-c", code, str(path))
    return gpu_minutes.Part(name, words, seconds, {f"{name}.txt": path}, **options)


def test_parts_end_by_the_clock_and_stop_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_minutes, "_LEAST", 0.0)
    monkeypatch.setattr(gpu_minutes, "_LARGEST", 1000)
    parts = [
        part("good", tmp_path, WRITE),
        part("endless", tmp_path, WRITE + "\nwhile True: pass", seconds=3.0),
        part("broken", tmp_path, "raise SystemExit(3)"),
        part("large", tmp_path, WRITE.replace("' '.join(sys.argv)", "'x' * 2000")),
        part("stage", tmp_path, WRITE, seconds=600.0, is_stage=True),
        part("late", tmp_path, WRITE, seconds=-1.0),
    ]
    out = tmp_path / "out"
    lines = gpu_minutes.run_parts(parts, out, 600.0)
    codes = [line.split(",")[0] for line in lines]
    assert codes[:2] == ["good: code 0", "endless: code -15"]
    assert codes[2:5] == ["broken: code 3", "large: code 0", "stage: code 0"]
    assert codes[5] == "late: not begun"
    kept = sorted(path.name for path in out.iterdir())
    assert kept == ["endless.txt", "good.txt", "log.txt", "stage.txt"]
    # 55 % of what was left, in minutes, less the seconds for its end.
    (limit,) = [w for w in (out / "stage.txt").read_text().split() if "max" in w]
    assert 4.5 < float(limit.removeprefix("--max_minutes=")) < 0.55 * 10.0
    assert "--- broken: code 3" in (out / "log.txt").read_text()


def test_a_process_that_hears_nothing_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_minutes, "_GRACE", 0.5)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    words = [sys.executable, "-c", f"{deaf}\nwhile True: pass"]
    with (tmp_path / "log").open("w") as log:
        assert gpu_minutes._run(words, log, 3.0) == -9


@pytest.mark.parametrize("dry", [True, False])
def test_every_part_is_a_command_of_its_script(tmp_path, dry):
    parts = gpu_minutes.make_parts(tmp_path / "work", 540.0, "Pong", dry=dry)
    for one in parts:
        dash_m, module, *rest = one.words
        assert dash_m == "-m"
        importlib.import_module(module)
        with flagsaver.flagsaver():
            assert flags.FLAGS(["script", *rest]) == ["script"]
    files = [name for one in parts for name in one.kept]
    # And the weights and the log.
    assert len(set(files)) == len(files) == 6
    assert sum(one.seconds for one in parts if not one.is_stage) < 0.7 * 540.0


def test_checks_of_numbers_pass_here_and_fail_where_they_should():
    assert gpu_checks.verdict(2.0, 1.0)["is_good"] is False
    assert gpu_checks._knn_error(5, True)["is_good"]
    assert gpu_checks._whitening_error()["is_good"]
    assert gpu_checks._large_replay(2**16) == {"elements": 9 * 7056, "is_good": True}
    assert gpu_checks._encoder_error("small", True)["is_good"]
    assert gpu_checks._relative([1.0, 2.0], [1.0, 4.0]) == 0.5


def test_a_profile_says_what_ran_and_how_often():
    def work():
        for _ in range(3):
            np.asarray(jnp.sin(jnp.ones(1000)))

    found = gpu_checks._profile(work)
    assert found == sorted(found, key=lambda one: -one["milliseconds"])
    assert all(one["count"] > 0 for one in found) and len(found) <= 40
