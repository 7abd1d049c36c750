"""The fast part of the fault harness; `make test-faults` runs all of it."""

import signal

from faults import harness


def test_a_run_killed_while_saving_and_stopped_while_tuning_is_the_same(tmp_path):
    """Kill -9 in the midst of a checkpoint, SIGTERM while fine-tuning, and on."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    harness.finish(whole, keep_checkpoints=1000)
    process = harness.Process(workdir, step_seconds=0.005)
    assert process.wait_for(process.is_saving)
    assert process.kill()
    harness.assert_on_the_way(workdir, whole)
    process = harness.Process(workdir, step_seconds=0.01)
    assert process.wait_for(lambda: process.sends >= 100)
    process.send(signal.SIGTERM)
    assert process.end() == harness.EXIT_CODE
    assert "SIGTERM noticed" in process.log
    assert harness.steps(workdir / "finetune")
    harness.finish(workdir)
    harness.assert_same_end(workdir, whole)
