r"""Evaluates a fine-tuned agent: full games, unclipped scores, no learning.

  python -m experiments.evaluate --checkpoint=runs/b --workdir=runs/b_eval --video

Game, network and protocol come from the checkpoint's run; flags that are given change
them, and the protocol is printed beside every score.
"""

import pathlib
import time
from collections.abc import Sequence

import jax.numpy as jnp
from absl import flags

from aps_jax import evaluation, pictures, rundir, stages
from aps_jax.interrupts import StopRequests
from aps_jax.progress import Progress
from experiments import common_flags, summary

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of the run whose newest agent is evaluated."
)
_VIDEO = flags.DEFINE_bool("video", False, "Also write WORKDIR/game.gif of one game.")


def main(argv: Sequence[str]) -> None:
    """Evaluates the agent that the flags name."""
    common_flags.reject_words(argv)
    workdir = common_flags.workdir_from_flags()
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint=DIR is needed: the folder of a finished run.")
    trained = stages.load_finetuned(pathlib.Path(_CHECKPOINT.value))
    config = common_flags.config_from_flags(trained.config)
    stages.check_fits(
        trained, pathlib.Path(_CHECKPOINT.value), config, trained.num_actions
    )
    rundir.open_run(
        workdir, stage="evaluate", config=config, checkpoint=_CHECKPOINT.value
    )
    task = jnp.asarray(trained.facts["inferred"]["task"], jnp.float32)
    started = time.monotonic()
    with StopRequests() as stop, Progress() as progress:
        played = evaluation.evaluate(
            config,
            trained.agent,
            trained.state.params,
            task,
            use_gpi=False,
            record_agent_steps=summary.VIDEO_AGENT_STEPS if _VIDEO.value else 0,
            progress=progress,
            stop=stop,
        )
    result = stages.evaluation_result(
        config, played.returns, checkpoint=_CHECKPOINT.value, started=started
    )
    rundir.write_json(workdir / rundir.RESULT_NAME, result)
    summary.print_results(config, {"evaluated": result})
    print(f"Result: {workdir / rundir.RESULT_NAME}")
    if _VIDEO.value:
        pictures.save_gif(workdir / "game.gif", played.pictures)
        print(f"Video: {workdir / 'game.gif'}")


if __name__ == "__main__":
    common_flags.run(main)
