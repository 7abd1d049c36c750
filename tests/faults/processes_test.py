"""Runs over several processes that lose one of them, or were started wrongly."""

import json
import pathlib
import signal
import subprocess
import sys

import hosts_runs
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]

KILLED = -signal.SIGKILL


def last_line(processes, index):
    return processes.said(index).splitlines()[-1]


def test_four_processes_whose_first_is_killed_are_the_run_of_one(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    # Of four numbers the sums are rounded in another order, and updates amplify it
    # (docs/scaling.md): one of pretraining, (240 - 64) * 0.05 / 8, and all of the rest.
    options = {"samples_per_step": 0.05}
    hosts_runs.Processes(one, 1, num_devices=4, **options).finish()
    processes = hosts_runs.Processes(four, 4, "--step_seconds=0.05", **options)
    processes.wait_for((four / "pretrain/checkpoints/160").exists)
    processes.send(0, signal.SIGKILL)
    assert processes.end(within=60) == [KILLED, 1, 1, 1]
    for index in (1, 2, 3):
        said = last_line(processes, index)
        assert said.startswith("error: process 0 (")
        assert "which connects all others, is gone. The last checkpoint is of " in said
    hosts_runs.Processes(four, 4, **options).finish()
    there, here = hosts_runs.learned(one), hosts_runs.learned(four)
    for name in there:
        np.testing.assert_allclose(
            there[name], here[name], rtol=1e-4, atol=1e-5, err_msg=name
        )
    there, here = hosts_runs.remembered(one), hosts_runs.remembered(four)
    for name in there:
        exact = "replay" in name
        np.testing.assert_allclose(
            there[name],
            here[name],
            rtol=0.0 if exact else 1e-4,
            atol=0.0 if exact else 1e-5,
            err_msg=name,
        )
    assert hosts_runs.files(one) == hosts_runs.files(four)


def test_a_request_to_one_stops_all_and_other_numbers_go_on(tmp_path):
    """Two processes, then four, then one: only the games begin anew."""
    workdir = tmp_path / "run"
    longer = {"pretrain_frames": 4 * 480}
    for count, step in ((2, 80), (4, 240)):
        processes = hosts_runs.Processes(
            workdir, count, "--step_seconds=0.1", num_devices=4, **longer
        )
        path = workdir / "pretrain" / "checkpoints"
        processes.wait_for((path / str(step)).exists)
        processes.send(count - 1, signal.SIGTERM)
        assert processes.end(within=60) == [75] * count
        saved = max(int(p.name) for p in path.iterdir() if p.name.isdecimal())
        # Of 8 environments: those until the look, and 8 iterations.
        assert step <= saved <= step + 80 + 8 * 8
        assert f"a checkpoint of agent step {saved:,} was saved" in last_line(
            processes, 0
        )
        assert (path / str(saved) / f"facts_{count - 1}.json").exists()
    processes = hosts_runs.Processes(workdir, 1, num_devices=2, **longer)
    processes.finish()
    assert f"resumed at agent step {saved:,}" in processes.said(0)
    result = json.loads((workdir / "pretrain" / "result.json").read_text())
    # (480 - 64) steps, half a sample each, 8 samples an update.
    assert result["updates"] == 26


def test_an_environment_that_breaks_ends_all(tmp_path):
    processes = hosts_runs.Processes(
        tmp_path / "run", 2, "--raise_at=25", "--raise_in=1"
    )
    assert processes.end(within=120) == [1, 1]
    broke = "the environment raised RuntimeError: the emulator broke. The last "
    assert last_line(processes, 1).startswith(f"error: {broke}")
    assert last_line(processes, 0).startswith("error: process 1 (")
    assert f") has failed: {broke}" in last_line(processes, 0)
    hosts_runs.Processes(tmp_path / "run", 2).finish()


def test_an_update_that_is_not_finite_ends_all_once(tmp_path):
    workdir = tmp_path / "run"
    processes = hosts_runs.Processes(workdir, 2, learning_rate=1e38)
    assert processes.end(within=120) == [2, 2]
    assert last_line(processes, 0).startswith("error: Not finite in update ")
    assert "error" not in processes.said(1)
    (path,) = (workdir / "pretrain").glob("nonfinite_*.npz")
    with np.load(path) as batch:
        assert len(batch["windows.id"]) == 4
        # Of the environments of both: the number of a step is that of its environment.
        assert set(batch["windows.id"].ravel() % 8) & {4, 5, 6, 7}


def test_a_process_that_hangs_ends_the_others(tmp_path):
    processes = hosts_runs.Processes(tmp_path / "run", 2, "--step_seconds=0.05")
    processes.wait_for((tmp_path / "run/pretrain/checkpoints/80").exists)
    processes.send(1, signal.SIGSTOP)
    try:
        codes = processes.end(within=60)
    except AssertionError:
        codes = None
    assert codes is None  # The one that hangs does.
    assert "is gone: not heard of for 30 s" in last_line(processes, 0)


def test_processes_that_were_started_differently_are_refused(tmp_path):
    workdir = tmp_path / "run"
    each = [["--raise_at=0"], ["--raise_at=1000"]]
    processes = hosts_runs.Processes(workdir, 2, each=each)
    assert processes.end(within=120) == [1, 2]
    reason = "--raise_at is '1000' here and '0' there"
    assert "was started otherwise than process 0 (" in last_line(processes, 1)
    assert reason in last_line(processes, 1) and reason in last_line(processes, 0)
    assert not workdir.exists()


def test_folders_that_are_not_shared_are_refused(tmp_path):
    each = [[], [f"--workdir={tmp_path}/other"]]
    processes = hosts_runs.Processes(tmp_path / "run", 2, each=each)
    assert processes.end(within=180) == [1, 2]
    said = last_line(processes, 1)
    assert "is not the folder of that name of process 0" in said
    assert "--workdir on a file system that all of them share" in said


def test_processes_that_never_come_are_told_of():
    place = f"localhost:{hosts_runs.free_port()}"
    code = (
        "from aps_jax import hosts;"
        f"hosts.connect(hosts.Place({place!r}, 2, 0, None, ''), {{}}, timeout_seconds=2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"error: the 2 processes of this run did not all come to {place} within 2 s"
    )


def run_main_job(workdir, count, *flags):
    address = f"localhost:{hosts_runs.free_port()}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "experiments.run_aps"),
                *("--game=Pong", "--preset=smoke", f"--num_devices={count}"),
                *("--num_envs=8", "--finetune_num_envs=8", "--replay_size=800"),
                f"--coordinator_address={address}",
                f"--num_processes={count}",
                *(f"--process_id={index}", f"--workdir={workdir}", *flags),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def ends(processes, within):
    said = [process.communicate(timeout=within)[0] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize("count", [2, 4])
def test_the_main_job_on_pong(tmp_path, count):
    """Preflight; both arms, stopped by a signal to all; and on to the result."""
    workdir = tmp_path / "run"
    preflight = ("--preflight", "--preflight_seconds=1")
    codes, said = ends(run_main_job(workdir, count, *preflight), 600)
    assert codes == [0] * count, said
    assert f"process {count - 1}: memory, finetune" in said[0]
    assert not workdir.exists()

    arms = "--arms=pretrained,scratch"
    processes = run_main_job(workdir, count, arms)
    rows = workdir / "pretrained" / "metrics.csv"
    while not rows.exists():
        assert all(process.poll() is None for process in processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, said = ends(processes, 60)
    assert codes == [75] * count, said
    codes, said = ends(run_main_job(workdir, count, arms), 600)
    assert codes == [0] * count, said
    assert "human-normalized" in said[0] and "The agent playing" in said[0]
    for other in said[1:]:
        assert [line for line in other.splitlines() if "[Gloo]" not in line] == []

    for name in ("result.json", "curves.png", "features.png", "game.gif"):
        assert (workdir / name).exists()
    for script, *words in (
        ("report", str(workdir), f"--out={tmp_path}/report"),
        ("evaluate", f"--checkpoint={workdir}", f"--workdir={tmp_path}/evaluation"),
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", f"experiments.{script}", *words],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "Pong" in done.stdout
