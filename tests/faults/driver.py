"""What the processes of the fault harness run: both stages, on the chain.

Everything is imported here, once, in the server process from which they are forked.
"""

import os
import pathlib
import resource
import sys
import time
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import distrax  # noqa: F401
    import orbax.checkpoint  # noqa: F401

import fakes
import tensorboardX.event_file_writer  # noqa: F401

from aps_jax import config as config_lib
from aps_jax.parallel import interrupts
from aps_jax.train import stages

OPTIONS = {
    "game": "Chain",
    "pretrain_frames": 4 * 240,
    "replay_size": 200,
    "warmup_agent_steps": 60,
    "report_agent_steps": 24,
    "checkpoint_agent_steps": 40,
    "finetune_agent_steps": 120,
    "infer_agent_steps": 60,
    # Draws random numbers, whose state must be resumed too.
    "sticky": 0.25,
}


def make_config(**options):
    """The smoke preset on the chain, smaller still."""
    return config_lib.replace_options(
        config_lib.preset_config("smoke"), **{**OPTIONS, **options}
    )


def limit_files(num_bytes):
    """Lets no file of this process grow beyond a size, as a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes or hard, hard))


def run(workdir, sends, step_seconds, full_between, options):
    """Runs pretraining and fine-tuning; ends as a scheduler would see it.

    Args:
      workdir: Folder of both stages.
      sends: Shared counter of the steps of all pools.
      step_seconds: How long a step of the environments takes.
      full_between: Steps between which no file can grow beyond 1 MiB, less than the
        arrays of a checkpoint; empty for never.
      options: Options of the config that differ from `OPTIONS`.
    """
    warnings.filterwarnings("ignore", module="orbax|flashbax|tensorboardX")
    workdir = pathlib.Path(workdir)
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)

    class Counted(fakes.ChainPool):
        def send(self, actions):
            sends.value += 1
            if sends.value in full_between:
                limit_files(2**20 if sends.value == full_between[0] else None)
            time.sleep(step_seconds)
            super().send(actions)

    config = make_config(**options)
    try:
        with interrupts.StopRequests() as stop:
            watched = {"constructor": Counted, "stop": stop}
            stages.pretrain(config, workdir / "pretrain", **watched)
            stages.finetune(
                config, workdir / "finetune", workdir / "pretrain", **watched
            )
    except interrupts.Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(interrupts.EXIT_CODE)
