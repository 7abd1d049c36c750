"""Tests of runs over several processes: they are the run of one, and end together.

What real processes are asked here is little, because each compiles for itself;
`make test-faults` asks for more.
"""

import pathlib
import signal

import hosts_runs
import numpy as np
import pytest
import scripts

from aps_jax.parallel import hosts


def test_two_processes_one_of_them_killed_are_the_run_of_one(tmp_path):
    """Kill -9 in the midst; the same command goes on, and all is equal to the bit."""
    one, two = tmp_path / "one", tmp_path / "two"
    hosts_runs.Processes(one, 1, num_devices=2).finish()
    processes = hosts_runs.Processes(two, 2, "--step_seconds=0.05")
    processes.wait_for((two / "pretrain/checkpoints/80").exists)
    processes.send(1, signal.SIGKILL)
    assert processes.end(within=60) == [1, -signal.SIGKILL]
    said = processes.said(0).splitlines()[-1]
    assert said.startswith("error: process 1 (")
    assert "is gone: not heard of for " in said
    assert said.endswith(
        "The last checkpoint is of agent step 80; the same commands on all hosts "
        "continue the run."
    )
    processes = hosts_runs.Processes(two, 2)
    processes.finish()
    assert "found by flags, on " in processes.said(0)
    assert "both stages ended" in processes.said(0)
    said = processes.said(1)
    assert [line for line in said.splitlines() if "[Gloo]" not in line] == []

    assert hosts_runs.files(one) == hosts_runs.files(two)
    for stage in hosts_runs.STAGES:
        rows = (one / stage / "metrics.csv").read_text()
        assert (two / stage / "metrics.csv").read_text() == rows
        assert rows.count("\n") > 4
        assert hosts_runs.result_of(one / stage) == hosts_runs.result_of(two / stage)
    for read in (hosts_runs.learned, hosts_runs.remembered):
        there, here = read(one), read(two)
        assert set(there) == set(here)
        for name in there:
            np.testing.assert_array_equal(there[name], here[name], err_msg=name)


def test_a_coordinator_that_does_not_answer_is_named():
    place = hosts.Place(f"localhost:{hosts_runs.free_port()}", 2, 1, None, "by flags")
    with pytest.raises(
        ValueError,
        match=rf"^No answer from process 0 at {place.coordinator}, the "
        r"coordinator_address, within 0 s \(.*refused\)\. Was it started, ",
    ):
        hosts.connect(place, {}, timeout_seconds=0)
    assert not hosts.is_connected()


def flags(address=None, count=None, index=None):
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
    }


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_a_place_by_flags():
    assert hosts.find_place(**flags(), environment={}) is None
    assert hosts.find_place(**flags("a:1", 1, 0), environment=SLURM) is None
    assert hosts.find_place(**flags(count=1), environment=SLURM) is None
    found = hosts.find_place(**flags("a:80", 2, 1), environment=SLURM)
    assert found == hosts.Place("a:80", 2, 1, None, "by flags")


@pytest.mark.parametrize(
    "given, message",
    [
        (
            flags("a:80"),
            "--coordinator_address without --num_processes and --process_id",
        ),
        (flags(count=2), "--num_processes without --coordinator_address and "),
        (flags(index=0), "--process_id without --coordinator_address and "),
        (flags("a:80", 2), "--coordinator_address and --num_processes without --proc"),
        (flags("a", 2, 0), "HOST:PORT of process 0, got 'a'"),
        (flags("a:b", 2, 0), "HOST:PORT of process 0, got 'a:b'"),
        (flags("a:70000", 2, 0), "HOST:PORT of process 0, got 'a:70000'"),
        (flags("a:80", 2, 2), r"in \[0, 2\), the --num_processes, got 2"),
        (flags("a:80", 1, 1), r"in \[0, 1\), the --num_processes, got 1"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        hosts.find_place(**given, environment={})


@pytest.mark.parametrize(
    "changes, address, devices",
    [
        # 61440 + (4097 + 2) % 4096.
        ({}, "gpu007:61443", None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "gpu007:61443", (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "5"}, "gpu007:61443", None),
        ({"SLURM_STEP_NODELIST": "a,b"}, "a:61443", None),
        ({"SLURM_STEP_NODELIST": "n[3,5]-ib"}, "n3-ib:61443", None),
        ({"SLURM_STEP_NODELIST": "solo"}, "solo:61443", None),
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
                "SLURM_LOCALID": "0",
                "CUDA_VISIBLE_DEVICES": "0,1",
            },
            "gpu007:61443",
            None,
        ),
    ],
)
def test_a_place_in_slurm(changes, address, devices):
    found = hosts.find_place(**flags(), environment={**SLURM, **changes})
    assert found == hosts.Place(address, 4, 3, devices, "by Slurm")


def test_a_step_that_says_too_little_is_refused():
    environment = {**SLURM}
    del environment["SLURM_LOCALID"]
    with pytest.raises(
        ValueError, match="of 4 tasks .* SLURM_LOCALID is not set: give"
    ):
        hosts.find_place(**flags(), environment=environment)


def test_a_script_for_one_process_refuses_to_be_one_of_several():
    given = ("--coordinator_address=a:80", "--num_processes=2", "--process_id=1")
    done = scripts.run_script("evaluate", *given)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: evaluate runs in one process, and this is one of 2, found by flags: "
        "start one task, or give --num_processes=1."
    )


def test_one_task_of_slurm_is_one_process():
    """So is a script in a batch job, whose own step has one task."""
    environment = {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}
    assert hosts.find_place(**flags(), environment=environment) is None
    del environment["SLURM_STEP_NUM_TASKS"]
    assert hosts.find_place(**flags(), environment=environment) is None


def test_a_process_that_is_alone_agrees_with_itself(tmp_path):
    assert hosts.by_first(lambda: hosts.by_first(lambda: [1, None])) == [1, None]
    assert hosts.num_processes() == 1 and hosts.is_first()
    hosts.check_shared(pathlib.Path(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert not hosts.is_stop_wished()
    hosts.finish(0)
    hosts.fail(1, "nothing")
