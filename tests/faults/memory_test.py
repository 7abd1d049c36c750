"""A long run on real Pong: memory, open files and threads do not grow."""

import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

AGENT_STEPS = 200_000
# Agent steps until all is compiled and the replay is full.
WARM_UP = 40_000

COMMAND = (
    "-m", "experiments.pretrain", "--game=Pong", "--preset=smoke",
    f"--pretrain_frames={4 * AGENT_STEPS}", "--num_envs=8", "--replay_size=8000",
    "--report_agent_steps=1000",
    # The interval of long runs, not the smoke preset's of every 200.
    "--checkpoint_agent_steps=2500000",
)  # fmt: skip


def observe(pid):
    """Returns resident MB, open files and threads of a process."""
    proc = pathlib.Path("/proc", str(pid))
    pages = int((proc / "statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return megabytes, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))


def test_200000_agent_steps_leak_nothing(tmp_path):
    rows = tmp_path / "run" / "metrics.csv"
    seen = []
    # As an installed program: without the tests' own settings of XLA.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *COMMAND, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None:
            if rows.exists():
                last = rows.read_text().splitlines()[-1].partition(",")[0]
                if last.isdigit() and (not seen or int(last) > seen[-1][0]):
                    seen.append((int(last), *observe(process.pid)))
            time.sleep(0.05)
        said = process.stderr.read()
    assert process.returncode == 0, said
    late = [sample for sample in seen if sample[0] >= WARM_UP]
    steps, megabytes, files, threads = map(np.array, zip(*late, strict=True))
    # The least of each 10,000 steps: what is held for a moment is no growth.
    places = steps // 10_000
    least = [megabytes[places == place].min() for place in np.unique(places)]
    slope = np.polyfit(np.unique(places), least, 1)[0]
    print(", ".join(f"{value:.1f}" for value in least))
    print(
        f"{len(late)} samples from agent step {steps[0]:,} to {steps[-1]:,}: "
        f"{least[0]:.1f} to {least[-1]:.1f} MB resident, {slope:+.3f} MB per "
        f"10,000 steps; {min(files)} to {max(files)} open files, {min(threads)} to "
        f"{max(threads)} threads"
    )
    assert len(late) > 30
    assert slope < 1.0
    half = len(late) // 2
    for counts in (files, threads):
        # A checkpoint under way has a thread and files of its own.
        change = statistics.median(counts[half:]) - statistics.median(counts[:half])
        assert abs(change) <= 1
