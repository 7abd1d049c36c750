"""Runs over several processes that lose one of them, or were started wrongly."""

import json
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import processes_runs
import pytest

from aps_jax.runs import checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]

KILLED = -signal.SIGKILL
CONTINUE = "The same commands on all hosts continue the run from its last checkpoint."


def last_line(run, index):
    return run.said(index).splitlines()[-1]


def test_four_processes_whose_first_is_killed_are_the_run_of_one(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    # Of four numbers the sums are rounded in another order, and updates amplify it
    # (docs/scaling.md): one of pretraining, (240 - 64) * 0.05 / 8, and all of the rest.
    options = {"samples_per_step": 0.05}
    processes_runs.Processes(one, 1, num_devices=4, **options).finish()
    run = processes_runs.Processes(four, 4, "--step_seconds=0.05", **options)
    run.wait_for((four / "pretrain/checkpoints/160").exists)
    run.send(0, signal.SIGKILL)
    # Gloo or JAX's own heartbeat is the first to notice; the latter aborts, and jaxlib
    # 0.10.2 crashes now and then while it does.
    codes = run.end(within=60)
    assert codes[0] == KILLED
    assert set(codes[1:]) <= {1, -signal.SIGABRT, -signal.SIGSEGV}
    for index in (1, 2, 3):
        assert last_line(run, index).startswith("error: ")
        assert last_line(run, index).endswith(CONTINUE)
    processes_runs.Processes(four, 4, **options).finish()
    there, here = processes_runs.learned(one), processes_runs.learned(four)
    for name in there:
        # Moments of the features amplify the last digits of the kernels once more.
        rtol = 2e-3 if "calibrated" in name else 1e-4
        np.testing.assert_allclose(
            there[name], here[name], rtol=rtol, atol=1e-5, err_msg=name
        )
    there, here = processes_runs.remembered(one), processes_runs.remembered(four)
    for name in there:
        exact = "replay" in name
        np.testing.assert_allclose(
            there[name],
            here[name],
            rtol=0.0 if exact else 1e-4,
            atol=0.0 if exact else 1e-5,
            err_msg=name,
        )
    assert processes_runs.files(one) == processes_runs.files(four)


def test_a_request_to_one_stops_all_and_other_numbers_go_on(tmp_path):
    """Two processes, then four, then one: only the games begin anew."""
    workdir = tmp_path / "run"
    longer = {"pretrain_frames": 4 * 480}
    for count, step in ((2, 80), (4, 240)):
        run = processes_runs.Processes(
            workdir, count, "--step_seconds=0.1", num_devices=4, **longer
        )
        path = workdir / "pretrain" / "checkpoints"
        run.wait_for((path / str(step)).exists)
        run.send(count - 1, signal.SIGTERM)
        assert run.end(within=60) == [75] * count
        saved = max(int(p.name) for p in path.iterdir() if p.name.isdecimal())
        # Of 8 environments: those until the look, and 8 iterations.
        assert step <= saved <= step + 80 + 8 * 8
        assert f"a checkpoint of agent step {saved:,} was saved" in last_line(run, 0)
        metadata = checkpoints.read_metadata(path / str(saved))
        assert len(metadata["environment"]) == count
    run = processes_runs.Processes(workdir, 1, num_devices=2, **longer)
    run.finish()
    assert f"resumed at agent step {saved:,}" in run.said(0)
    result = json.loads((workdir / "pretrain" / "result.json").read_text())
    # (480 - 64) steps, half a sample each, 8 samples an update.
    assert result["updates"] == 26


@pytest.mark.parametrize("index", [0, 1])
def test_an_environment_that_breaks_ends_all(tmp_path, index):
    run = processes_runs.Processes(
        tmp_path / "run", 2, "--raise_at=25", f"--raise_in={index}"
    )
    codes = run.end(within=120)
    assert codes[index] == 1 and codes[1 - index] in (1, -signal.SIGABRT)
    broke = "the environment raised RuntimeError: the emulator broke"
    assert f"error: {broke}" in run.said(index)
    assert last_line(run, 1 - index).endswith(CONTINUE)
    if index == 1:  # Without process 0 JAX may abort before Python can say more.
        assert last_line(run, 0).startswith("error: process 1 (")
        assert f") has failed: {broke}" in last_line(run, 0)
    processes_runs.Processes(tmp_path / "run", 2).finish()


def test_an_update_that_is_not_finite_ends_all_once(tmp_path):
    workdir = tmp_path / "run"
    run = processes_runs.Processes(workdir, 2, learning_rate=1e38)
    assert run.end(within=120) == [2, 2]
    assert last_line(run, 0).startswith("error: Not finite in update ")
    assert "error" not in run.said(1)
    (path,) = (workdir / "pretrain").glob("nonfinite_*.npz")
    with np.load(path) as batch:
        assert len(batch["windows.id"]) == 4
        # Of the environments of both: the number of a step is that of its environment.
        assert set(batch["windows.id"].ravel() % 8) & {4, 5, 6, 7}


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_hangs_ends_the_others(tmp_path, index):
    run = processes_runs.Processes(tmp_path / "run", 2, "--step_seconds=0.05")
    run.wait_for((tmp_path / "run/pretrain/checkpoints/80").exists)
    run.send(index, signal.SIGSTOP)
    run.wait_for_end_of(1 - index, within=60)
    run.send(index, signal.SIGKILL)
    codes = run.end()
    assert codes[index] == KILLED and codes[1 - index] == -signal.SIGABRT
    assert (
        last_line(run, 1 - index)
        == f"error: process {1 - index} lost the others. {CONTINUE}"
    )


def test_a_request_reaches_a_primary_that_evaluates(tmp_path):
    """The others wait for it, and are asked to stop themselves."""
    run = processes_runs.Processes(
        tmp_path / "run", 2, "--step_seconds=0.1", eval_episodes=100
    )
    # Those of pretraining, of fine-tuning and of its first evaluation.
    run.wait_for(lambda: run.said(0).count("environments started") == 3)
    run.send(1, signal.SIGUSR1)
    assert run.end(within=60) == [75, 75]
    assert "SIGUSR1 noticed" in run.said(1) and "SIGUSR1" not in run.said(0)


def test_processes_that_were_started_differently_are_refused(tmp_path):
    workdir = tmp_path / "run"
    each = [["--raise_at=0"], ["--raise_at=1000"]]
    run = processes_runs.Processes(workdir, 2, each=each)
    assert run.end(within=120) == [2, 2]
    assert "--raise_at is '1000' in process 1 (" in last_line(run, 0)
    assert "and '0' in process 0 (" in last_line(run, 0)
    assert not workdir.exists()


def test_folders_that_are_not_shared_are_refused(tmp_path):
    each = [[], [f"--workdir={tmp_path}/other"]]
    run = processes_runs.Processes(tmp_path / "run", 2, each=each)
    assert run.end(within=180) == [2, 2]
    assert last_line(run, 0).startswith("error: process 1 (")
    assert "--workdir that all of them share" in last_line(run, 0)


def connect(place, index):
    """Runs `processes.connect` in a process of its own, with 2 s to wait."""
    code = (
        "from aps_jax.parallel import processes\n"
        f"arguments = processes.distributed_arguments({place!r}, 2, {index}, {{}})\n"
        "processes.connect(arguments, {}, timeout_seconds=2)"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_never_come_are_told_of(index):
    place = f"localhost:{processes_runs.free_port()}"
    done = connect(place, index)
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.splitlines()[-1].startswith(
        f"error: not all processes of this run came to {place} within 2 s"
    )


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place = f"localhost:{taken.getsockname()[1]}"
        done = connect(place, 0)
    # JAX raises, or (jaxlib 0.10.2) crashes now and then.
    assert done.returncode in (1, -signal.SIGSEGV)
    said = done.stderr.splitlines()[-1]
    assert place in said and "port" in said


def run_main_job(workdir, count, *flags):
    address = f"localhost:{processes_runs.free_port()}"
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


def ends(started, within):
    said = [process.communicate(timeout=within)[0] for process in started]
    return [process.returncode for process in started], said


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
    started = run_main_job(workdir, count, arms)
    rows = workdir / "pretrained" / "metrics.csv"
    while not rows.exists():
        assert all(process.poll() is None for process in started)
    for process in started:
        process.send_signal(signal.SIGTERM)
    codes, said = ends(started, 60)
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
