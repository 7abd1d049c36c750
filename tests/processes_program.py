"""What one process of a run over several hosts does in tests: both stages.

  python processes_program.py --workdir=DIR --coordinator_address=HOST:PORT \
    --num_processes=2 --process_id=0 --options='{"num_devices": 2}'
"""

import json
import os
import sys
import time
import warnings

import fakes
import jax
import orbax.checkpoint  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401
from absl import flags

from aps_jax import config as config_lib
from aps_jax.train import stages
from experiments import common_flags

OPTIONS = {
    "game": fakes.PLANES,
    "encoder": "mlp",
    "num_envs": 8,
    "pretrain_frames": 4 * 240,
    "replay_size": 200,
    "warmup_agent_steps": 64,
    "report_agent_steps": 40,
    "checkpoint_agent_steps": 80,
    "finetune_num_envs": 8,
    "finetune_agent_steps": 160,
    "infer_agent_steps": 80,
    "eval_episodes": 3,
    # Draws random numbers, from a seed for each environment.
    "sticky": 0.25,
}

_OPTIONS = flags.DEFINE_string("options", "{}", "Options that differ, as JSON.")
_STEP_SECONDS = flags.DEFINE_float("step_seconds", 0.0, "What a step takes.")
_RAISE_AT = flags.DEFINE_integer("raise_at", 0, "Step at which --raise_in raises.")
_RAISE_IN = flags.DEFINE_integer("raise_in", 0, "Process whose environments raise.")


class Pool(fakes.PlanesPool):
    """A chain that takes its time, and may raise."""

    steps = 0

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print("environments started", flush=True)

    def send(self, actions):
        Pool.steps += 1
        if Pool.steps == _RAISE_AT.value and _RAISE_IN.value == jax.process_index():
            raise RuntimeError("the emulator broke")
        time.sleep(_STEP_SECONDS.value)
        super().send(actions)


def main(argv):
    common_flags.reject_words(argv)
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"), **{**OPTIONS, **json.loads(_OPTIONS.value)}
    )
    workdir = common_flags.workdir_from_flags()
    with common_flags.watched() as watched:
        stages.pretrain(config, workdir / "pretrain", constructor=Pool, **watched)
        stages.finetune(
            config,
            workdir / "finetune",
            workdir / "pretrain",
            constructor=Pool,
            **watched,
        )
    print("both stages ended")


def run(argv, log, environment):
    """Runs as a script of its own would, in a process that was forked.

    Args:
      argv: Flags.
      log: File to which standard output and standard error go.
      environment: Variables.
    """
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    warnings.filterwarnings("ignore", module="orbax|flashbax|tensorboardX")
    sys.argv = ["processes_program", *argv]
    common_flags.run(main, is_for_several=True)


if __name__ == "__main__":
    common_flags.run(main, is_for_several=True)
