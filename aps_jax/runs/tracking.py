"""Weights & Biases, only for those who ask for it: imported when a run starts.

TensorBoard events are written by default and need no account; see `metrics`.
"""

import hashlib
import importlib.util
import pathlib
from typing import Any

from aps_jax import config as config_lib

_PROJECT = "aps_jax"


def check_wandb() -> None:
    """Raises a `ValueError` if Weights & Biases is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--wandb needs the package wandb: pip install 'aps_jax[wandb]'. TensorBoard "
            "events are written without it."
        )


def start_wandb(config: config_lib.Config, workdir: pathlib.Path) -> Any:
    """Starts or goes on with the W&B run of a stage's folder.

    Args:
      config: The run's values, which W&B shows beside its curves.
      workdir: Folder of the stage; the run's id is made of its full path, so that a
        resumed stage continues its curves.

    Returns:
      W&B's run, with `log` and `finish`.

    Raises:
      ValueError: W&B is not installed.
    """
    check_wandb()
    import wandb

    workdir = workdir.resolve()
    return wandb.init(
        project=_PROJECT,
        dir=str(workdir),
        id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16],
        name=f"{config.game} {config.agent} seed {config.seed} {workdir.name}",
        group=str(workdir.parent.name),
        resume="allow",
        config=config_lib.to_dict(config),
    )
