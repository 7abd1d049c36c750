"""Tests that a run asked to stop saves what it has, and goes on from there."""

import contextlib
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.parallel import interrupts
from aps_jax.runs import metrics
from aps_jax.train import stages

ROOT = pathlib.Path(__file__).parents[2]


def make_config(**options):
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "pretrain_frames": 4 * 240,
        "replay_size": 240,
        "warmup_agent_steps": 60,
        "report_agent_steps": 80,
        "checkpoint_agent_steps": 100_000,
        "finetune_agent_steps": 120,
        "infer_agent_steps": 60,
        **options,
    }
    return config_lib.replace_options(config_lib.preset_config("smoke"), **options)


def signalled(num_steps, number=signal.SIGTERM):
    """A chain whose process gets a signal after some steps of all environments."""

    class Signalled(fakes.PlanesPool):
        steps = 0

        def send(self, actions):
            Signalled.steps += 1
            if Signalled.steps == num_steps:
                os.kill(os.getpid(), number)
            super().send(actions)

    return Signalled


def run_out(num_steps):
    """A chain whose time limit is over after some steps of all environments."""
    timers = []

    class Limited(fakes.PlanesPool):
        steps = 0

        def send(self, actions):
            Limited.steps += 1
            if Limited.steps == num_steps:
                (limit,) = (one for one in timers if one.interval == 600.0)
                limit.function()
            super().send(actions)

    def start_timer(seconds, function):
        timers.append(threading.Timer(seconds, function))
        return timers[-1]

    return Limited, start_timer


class Limited(NamedTuple):
    """A pretraining that its time limit stopped, and what was said of it."""

    folder: pathlib.Path
    printed: str
    message: str


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limited")
    pool, start_timer = run_out(31)
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(printed),
        pytest.raises(interrupts.Interrupted) as stopped,
    ):
        patch.setattr(interrupts, "_start_timer", start_timer)
        with interrupts.StopRequests(max_minutes=10.0) as stop:
            stages.pretrain(make_config(), folder, constructor=pool, stop=stop)
    return Limited(folder, printed.getvalue(), str(stopped.value))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, limited):
    """The result of a fine-tuning of it that nobody interrupted."""
    return stages.finetune(
        make_config(),
        tmp_path_factory.mktemp("whole"),
        limited.folder,
        constructor=fakes.PlanesPool,
    )


def test_a_stage_ends_at_its_time_limit_and_can_be_fine_tuned(limited, whole):
    said = "--max_minutes=10 are over: stopping at the next step\n"
    assert limited.printed.endswith(said)
    assert "a checkpoint of agent step 124 was saved" in limited.message
    trained = stages.load_pretrained(limited.folder)
    assert trained.facts["agent_steps"] == 31 * 4
    # (124 - 60) steps, half a sample each, 8 samples an update.
    assert int(trained.state.num_updates) == 4
    # What was pretrained so far is fine-tuned, and the frames say how far that was.
    assert whole["pretrain_frames"] == 4 * 124
    assert whole["init_agent_steps"] == 124


def test_pretraining_goes_on_from_the_step_of_each_request(tmp_path, limited):
    """It resumes exactly: the same updates from the same replay."""
    config, folder = make_config(), tmp_path / "pretrain"
    shutil.copytree(limited.folder, folder)
    first = jax.device_get(stages.load_pretrained(folder).state)
    # Another limit, or none, is still this run.
    with (
        pytest.raises(interrupts.Interrupted),
        interrupts.StopRequests(max_minutes=99.0) as stop,
    ):
        # Asked again before its first step is over: one step more, nothing lost.
        pool = signalled(1, signal.SIGINT)
        stages.pretrain(config, folder, constructor=pool, stop=stop)
    second = stages.load_pretrained(folder)
    assert second.facts["agent_steps"] == 32 * 4
    for x, y in zip(
        jax.tree.leaves(first.params),
        jax.tree.leaves(jax.device_get(second.state.params)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(interrupts.Interrupted), interrupts.StopRequests() as stop:
        stages.pretrain(config, folder, constructor=signalled(9), stop=stop)
    third = stages.load_pretrained(folder)
    assert third.facts["agent_steps"] == 41 * 4
    # (164 - 60) steps.
    assert int(third.state.num_updates) == 6
    done = stages.pretrain(config, folder, constructor=fakes.PlanesPool)
    assert done["updates"] == 11
    assert done["pretrain_frames"] == 4 * 240
    columns = metrics.read_metrics(folder / "metrics.csv")
    assert columns["agent_steps"] == [80.0, 160.0, 240.0]


# Steps of 4 environments: 15 infer, then each evaluation plays 2 games of 20 at most.
@pytest.mark.parametrize("stops", [(9,), (18, 45)])
def test_finetuning_goes_on_from_any_phase(tmp_path, limited, whole, stops):
    """While it infers (9), evaluates zero-shot (18) and learns or evaluates (45)."""
    config, folder = make_config(), tmp_path / "parts"
    for num_steps in stops:
        with pytest.raises(interrupts.Interrupted), interrupts.StopRequests() as stop:
            stages.finetune(
                config,
                folder,
                limited.folder,
                constructor=signalled(num_steps),
                stop=stop,
            )
        assert not (folder / "result.json").exists()
    resumed = stages.finetune(
        config, folder, limited.folder, constructor=fakes.PlanesPool
    )
    for name in ("updates", "finetune_agent_steps"):
        assert resumed[name] == whole[name]
    assert [e["agent_steps"] for e in resumed["evaluations"]] == [60, 120]
    if stops[0] > 15:
        assert resumed["adapted"] == whole["adapted"]
        assert resumed["evaluations"][0] == whole["evaluations"][0]
    rows = metrics.read_metrics(folder / "metrics.csv")["agent_steps"]
    assert rows == [60.0, 80.0, 120.0]


@pytest.mark.usefixtures("hangup_is_noticed")
@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU"])
def test_signals_that_end_jobs_are_requests_to_stop(name):
    number = getattr(signal, f"SIG{name}")
    before = signal.getsignal(number)
    with interrupts.StopRequests() as stop:
        stop.check()
        assert not interrupts.is_requested()
        os.kill(os.getpid(), number)
        assert interrupts.is_requested()
        with pytest.raises(interrupts.Interrupted):
            stop.check()
    assert signal.getsignal(number) == before
    assert not interrupts.is_requested()


def test_hangups_stay_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_time_limit_is_a_request_to_stop():
    with interrupts.StopRequests(max_minutes=1e-6) as stop:
        assert stop._requested.wait(timeout=60)
        with pytest.raises(interrupts.Interrupted):
            stop.check()
    with interrupts.StopRequests(max_minutes=60.0) as stop:
        stop.check()
        limit = stop._limit
    assert limit.finished.is_set()  # Cancelled: nothing is said after the end.


def test_a_stopped_other_process_stops_this_one():
    told = []
    with interrupts.StopRequests(is_other_stopped=lambda: bool(told)) as stop:
        stop.check()
        told.append(True)
        with pytest.raises(interrupts.Interrupted):
            stop.check()
        assert not stop.is_requested()


DEAF = """
import hashlib
from aps_jax.parallel import interrupts
with interrupts.StopRequests(patience_seconds=1.5):
    print("ready", flush=True)
    # One call into C that lets other threads run, as a long compilation does.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

NOTICED = "{} noticed: stopping at the next step; a second Ctrl-C stops at once"

BUSY = """
from aps_jax.parallel import interrupts
with interrupts.StopRequests() as stop:
    print("ready", flush=True)
    try:
        while True:
            stop.check()
    except interrupts.Interrupted:
        print("noticed", flush=True)
    while True:
        pass
"""


@contextlib.contextmanager
def process_of(*arguments):
    """A process that is ended and whose pipes are closed, whatever happens."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_computation_that_hears_nothing_is_ended_from_outside():
    with process_of("-c", DEAF) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR2)
        _, said = process.communicate(timeout=60)
        assert process.returncode == interrupts.EXIT_CODE
        assert "continues from the last checkpoint" in said


def test_a_second_interrupt_stops_at_once():
    with process_of("-c", BUSY) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "noticed\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == interrupts.EXIT_CODE
        assert said.splitlines() == [NOTICED.format("SIGINT")]


def test_a_script_says_how_to_continue_and_asks_to_be_run_again(tmp_path):
    with process_of(
        "-m", "experiments.pretrain", "--preset=smoke", "--report_agent_steps=40",
        "--game=maze/four_rooms", "--encoder=mlp",
        "--pretrain_frames=4000000", f"--workdir={tmp_path / 'w'}",
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        rows = tmp_path / "w" / "metrics.csv"
        while time.monotonic() < deadline and process.poll() is None:
            if rows.exists() and rows.read_text().count("\n") > 8:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == interrupts.EXIT_CODE, said
    assert "the same command continues" in said
    assert stages.load_pretrained(tmp_path / "w").facts["agent_steps"] > 120
