"""Weights & Biases, only for those who ask for it: imported when a run starts.

TensorBoard events are written by default and need no account; see `metrics`.
"""

import hashlib
import importlib.util
import pathlib
from typing import Any

from aps_jax import config as config_lib

_PROJECT = "aps_jax"
_STEP = "agent_steps"  # the horizontal axis of all other metrics


def check_wandb() -> None:
    """Raises a `ValueError` if W&B is not installed, or has no key that it takes."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--wandb needs the package wandb: pip install 'aps_jax[wandb]'. "
            "TensorBoard events are written without it."
        )
    import wandb

    try:
        wandb.login()  # Asks for the key on a terminal; offline it needs none.
    except wandb.Error as error:
        raise ValueError(
            f"--wandb: {_line(error)} Set WANDB_API_KEY, or WANDB_MODE=offline to send "
            "the rows later."
        ) from error


def start_wandb(config: config_lib.Config, workdir: pathlib.Path) -> Any:
    """Starts or goes on with the W&B run of a stage's folder.

    Its curves are over agent steps. W&B's own step never goes back, so that it would
    drop the rows that a resumed stage writes again.

    The folder's full path makes the run's id, so that a resumed stage continues them.

    Returns:
      W&B's run, with `log` and `finish`.

    Raises:
      ValueError: W&B cannot start the run.
    """
    import wandb

    workdir = workdir.resolve()
    try:
        run = wandb.init(
            project=_PROJECT,
            dir=str(workdir),
            id=hashlib.sha256(bytes(workdir)).hexdigest()[:16],
            name=f"{config.game} {config.agent} seed {config.seed} {workdir.name}",
            group=str(workdir.parent.name),
            resume="allow",
            config=config_lib.to_dict(config),
        )
    except wandb.Error as error:
        raise ValueError(f"--wandb: {_line(error)}") from error
    run.define_metric(_STEP)
    run.define_metric("*", step_metric=_STEP)
    return run


def _line(error: Exception) -> str:
    """Returns an error's message as one sentence."""
    return " ".join(str(error).split()).rstrip(".") + "."
