"""Real processes, really killed: every run ends as one that was left alone."""

import random
import signal
import time

import pytest
from faults import harness

# Steps of the pools of a whole run: 60 of pretraining; 15 of inference; an evaluation
# of up to 20; 15 of fine-tuning; another evaluation.
PHASES = {
    "warm-up": 6,
    "pretraining": 40,
    "inference": 68,
    "zero-shot evaluation": 78,
    "fine-tuning": 103,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody disturbs, with every checkpoint kept."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    harness.finish(workdir, keep_checkpoints=1000)
    return workdir


@pytest.mark.parametrize("seed", range(4))
def test_five_kills_at_random_moments_change_nothing(whole, tmp_path, seed):
    """Kills at random steps, and at random moments of writing a checkpoint."""
    rng = random.Random(seed)
    kills = runs = 0
    while kills < 5:
        workdir = tmp_path / f"run{runs}"
        process = harness.Process(workdir, step_seconds=0.005)
        if rng.random() < 0.5:
            process.wait_for(process.is_saving)
            place = "while saving"
        else:
            target = rng.randrange(45)
            process.wait_for(lambda p=process, n=target: p.sends >= n)
            place = f"at step {target}"
        time.sleep(rng.random() * 0.03)
        if process.kill():
            kills += 1
            print(f"seed {seed}, kill {kills}: {place}", flush=True)
            harness.assert_on_the_way(workdir, whole)
        else:  # It was over before: begin another run.
            harness.assert_same_end(workdir, whole)
            runs += 1
    harness.finish(workdir)
    harness.assert_same_end(workdir, whole)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_is_noticed_saved_and_resumed(whole, tmp_path, phase, number):
    workdir = tmp_path / "run"
    process = harness.Process(workdir, step_seconds=0.02)
    assert process.wait_for(lambda: process.sends >= PHASES[phase])
    sent = time.monotonic()
    process.send(number)
    assert process.wait_for(lambda: f"{number.name} noticed" in process.log)
    noticed = time.monotonic() - sent
    assert process.end() == harness.EXIT_CODE
    ended = time.monotonic() - sent
    print(f"{number.name} in {phase}: noticed in {noticed:.2f} s, over in {ended:.2f}")
    assert noticed < 2.0
    assert "a checkpoint of agent step" in process.log
    harness.finish(workdir)
    harness.assert_same_end(workdir, whole)


def test_a_second_interrupt_leaves_the_last_checkpoint_whole(whole, tmp_path):
    workdir = tmp_path / "run"
    process = harness.Process(workdir, step_seconds=0.02)
    process.wait_for(lambda: process.sends >= 40)
    process.send(signal.SIGINT)
    process.wait_for(lambda: "SIGINT noticed" in process.log)
    process.send(signal.SIGINT)
    assert process.end() == harness.EXIT_CODE
    harness.assert_on_the_way(workdir, whole)
    harness.finish(workdir)
    harness.assert_same_end(workdir, whole)


def test_a_disk_that_is_full_for_a_while_costs_nothing(whole, tmp_path):
    """From iteration 8 to 32 the kernel refuses all that is larger than 1 MiB."""
    said = harness.finish(tmp_path / "run", full_between=(8, 32))
    assert said.count("cannot write to") >= 2
    harness.assert_same_end(tmp_path / "run", whole)


def test_a_second_process_is_refused_and_hurts_nothing(whole, tmp_path):
    workdir = tmp_path / "run"
    first = harness.Process(workdir, step_seconds=0.02)
    assert first.wait_for(lambda: first.sends >= 3)
    second = harness.Process(workdir)
    assert second.end() == 1
    assert "is in use by another process (process" in second.log
    assert first.end() == 0
    harness.assert_same_end(workdir, whole)
