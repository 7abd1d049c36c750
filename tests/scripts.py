"""Runs the experiments' scripts as a user does."""

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
