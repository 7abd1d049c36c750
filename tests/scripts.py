"""Runs the experiments' scripts as a user does, and programs of the tests."""

import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

import forks
from absl import flags

ROOT = pathlib.Path(__file__).parents[1]


def _run(script, arguments, environment, files):
    """What the forked process does; `multiprocessing` makes the exit code."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    runpy.run_module(f"experiments.{script}", run_name="__main__", alter_sys=True)


def run_script(script, *arguments, timeout=120):
    """Runs a script in a process of its own: flags are global to a process."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = forks.server().Process(
            target=_run,
            args=(script, arguments, dict(os.environ), (out.name, err.name)),
        )
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        said, complained = out.read().decode(), err.read().decode()
    return subprocess.CompletedProcess(
        arguments, process.exitcode, stdout=said, stderr=complained
    )


def set_flags(**values):
    """Gives flags of this process values, as a command line does."""
    for name, value in values.items():
        flags.FLAGS[name].value = value
        flags.FLAGS[name].present = 1


def run_python(*words, **environment):
    """Runs Python, with the modules of the tests at hand; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_devices_program(folder, part):
    """Runs a part of `devices_program.py` in a process that has 8 devices."""
    program = pathlib.Path(__file__).parent / "devices_program.py"
    # Optimised, as it runs for longer than it compiles.
    flags = os.environ["XLA_FLAGS"].replace("level=0", "level=1")
    flags += " --xla_force_host_platform_device_count=8"
    run_python(program, folder, part, XLA_FLAGS=flags)
