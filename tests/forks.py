"""Forks processes from a server that has imported everything and started nothing.

That saves the seconds that importing takes.
"""

import functools
import multiprocessing
import os
import pathlib

TESTS = pathlib.Path(__file__).resolve().parent

# What scripts and programs import, so that one server serves all of a worker.
SCRIPTS = (
    "experiments.common_flags",
    "experiments.summary",
    "aps_jax.report.run_pictures",
    "aps_jax.report.by_reward",
    "aps_jax.train.evaluation",
    "orbax.checkpoint",
    "tensorboardX.event_file_writer",
)


@functools.cache
def server(*programs: str):
    """Returns the server of a test module; it starts with its first process."""
    # Threads of a library that is merely imported would not survive a fork.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*programs, *SCRIPTS])
    return context
