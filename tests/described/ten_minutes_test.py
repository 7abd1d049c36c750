"""Runs the ten minutes of a GPU on this machine's CPU, in the smallest size."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_a_dry_run_leaves_its_files_in_time(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", "examples/scripts/ten_minutes_gpu.sh", out, "--dry"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "WORK": str(tmp_path / "work"),
        },
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert len(files) <= 8 and max(files.values()) <= 16 * 2**20
    assert {"log.txt", "loop.json", "pretrain.csv", "weights.npz"} <= set(files)
    assert (
        json.loads((out / "loop.json").read_text())["compilations in 20 iterations"]
        == 0
    )
