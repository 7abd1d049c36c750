"""Tests of runs over several processes: they are the run of one, and end together.

What real processes are asked here is little, because each compiles for itself;
`make test-faults` asks for more.
"""

import signal

import numpy as np
import processes_runs
import pytest
import scripts

from aps_jax.parallel import processes


def test_two_processes_one_of_them_killed_are_the_run_of_one(tmp_path):
    """Kill -9 in the midst; the same command goes on, and all is equal to the bit."""
    one, two = tmp_path / "one", tmp_path / "two"
    processes_runs.Processes(one, 1, num_devices=2).finish()
    both = processes_runs.Processes(two, 2, "--step_seconds=0.05")
    both.wait_for((two / "pretrain/checkpoints/80").exists)
    both.send(1, signal.SIGKILL)
    assert both.end(within=60) == [1, -signal.SIGKILL]
    said = both.said(0).splitlines()[-1]
    assert said.startswith("error: lost another process (")
    assert said.endswith(
        "The same commands on all hosts continue the run from its last checkpoint."
    )
    both = processes_runs.Processes(two, 2)
    both.finish()
    assert "A run of process 0 (" in both.said(0)
    assert "both stages ended" in both.said(0)
    said = both.said(1)
    assert [line for line in said.splitlines() if "[Gloo]" not in line] == []

    assert processes_runs.files(one) == processes_runs.files(two)
    for stage in processes_runs.STAGES:
        rows = (one / stage / "metrics.csv").read_text()
        assert (two / stage / "metrics.csv").read_text() == rows
        assert rows.count("\n") > 4
        assert processes_runs.result_of(one / stage) == processes_runs.result_of(
            two / stage
        )
    for read in (processes_runs.learned, processes_runs.remembered):
        there, here = read(one), read(two)
        assert set(there) == set(here)
        for name in there:
            np.testing.assert_array_equal(there[name], here[name], err_msg=name)


SLURM = {
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
}


def choose(address=None, count=None, index=None, environment=None):
    return processes.distributed_arguments(address, count, index, environment or {})


def test_one_process_is_not_connected():
    assert choose() is None
    assert choose("a:1", 1, 0, SLURM) is None
    assert choose(count=1, environment=SLURM) is None
    # One task of Slurm, and a script in a batch job outside of any step.
    assert choose(environment={**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert choose(environment={"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "4"}) is None


def test_flags_come_before_slurm():
    found = choose("a:80", 2, 1, SLURM)
    assert found == {
        "coordinator_address": "a:80",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize("address", ["a", "a:b", "a:70000", ":80"])
def test_a_wrong_address_is_refused(address):
    with pytest.raises(ValueError, match="HOST:PORT of process 0, got "):
        choose(address, 2, 0)


@pytest.mark.parametrize(
    "given", [("a:80", None, 0), ("a:80", 2, None), (None, 2, 1), (None, 2, None)]
)
def test_incomplete_flags_are_refused(given):
    with pytest.raises(ValueError, match="needs all of --coordinator_address, "):
        choose(*given, SLURM)


@pytest.mark.parametrize(
    "changes, devices",
    [
        # Two tasks on each of two nodes; this is the second of its node.
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "5"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_NUM_NODES": "4"}, []),
        ({"SLURM_STEP_NUM_NODES": "4"}, []),
    ],
)
def test_tasks_of_slurm_share_the_gpus_of_a_node(changes, devices):
    found = choose(environment={**SLURM, **changes})
    assert found == {
        "num_processes": 4,
        "cluster_detection_method": "slurm",
        "local_device_ids": devices,
    }


def test_a_script_for_one_process_refuses_to_be_one_of_several():
    given = ("--coordinator_address=a:80", "--num_processes=2", "--process_id=1")
    done = scripts.run_script("evaluate", *given)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: evaluate runs in one process, and this is one of 2: start one task, or "
        "give --num_processes=1."
    )


def test_a_single_process_agrees_with_itself(tmp_path):
    nested = processes.broadcast_from_primary(
        lambda: processes.broadcast_from_primary(lambda: [1, None])
    )
    assert nested == [1, None]
    assert processes.all_gather("a") == ["a"]
    assert processes.num_processes() == 1 and processes.is_primary()
    assert [processes.any_process(flag) for flag in (False, True)] == [False, True]
    assert not processes.is_other_stopped()
    processes.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert processes.lost_process(ValueError("Gloo")) is None
    processes.disconnect()
