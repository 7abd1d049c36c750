"""Runs the experiments' scripts as a user does, and the program of several devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run_script(script, *arguments, timeout=120):
    """Runs a script in a process of its own: flags are global to a process."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{script}", *arguments],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
        timeout=timeout,
    )


def run_devices_program(folder, part):
    """Runs a part of `devices_program.py` in a process that has 8 devices."""
    program = pathlib.Path(__file__).parent / "devices_program.py"
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"]
        + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(program.parent)]),
    }
    done = subprocess.run(
        [sys.executable, program, folder, part],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
