"""What a stage measures: each metric declared once, written as CSV and TensorBoard.

docs/metrics.md is made from these declarations, by `python -m experiments.pages`.
"""

import csv
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FILE_NAME = "metrics.csv"


class Metric(NamedTuple):
    """A measured quantity, as the documentation explains it."""

    name: str
    unit: str
    meaning: str


# The first columns of every stage's file: how far it is.
COUNTERS = (
    Metric("agent_steps", "agent steps", "Steps of all environments in this stage."),
    Metric("frames", "emulator frames", "Agent steps times the frame skip of 4."),
    Metric("updates", "updates", "Gradient steps made in this stage."),
    Metric("episodes", "games", "Games finished in this stage."),
    Metric(
        "episode_return",
        "points",
        "Mean over environments of the unclipped score of the last finished game; NaN "
        "until one has ended. While pretraining the agent never sees it.",
    ),
    Metric(
        "episode_length",
        "agent steps",
        "Mean over environments of the length of the last finished game.",
    ),
)

# Means over the updates since the row before; NaN where there was none.
LEARNING = (
    Metric("loss_td", "-", "Half the squared TD error, summed over its components."),
    Metric("td_error", "-", "Norm of the TD error of a replayed target."),
    Metric("q_value", "-", "Q(s, a, w) = psi(s, a, w)^T w of replayed actions."),
    Metric("gradient_norm", "-", "Norm of the whole gradient before clipping."),
)
PRETRAINING = (
    Metric("reward_skill", "-", "phi(s_t)^T w over the states that targets sum."),
    Metric(
        "reward_entropy", "-", "log(c + mean scaled distance to k nearest particles)."
    ),
    Metric("loss_feature", "-", "-phi(s_t)^T w_tm1: the skill's likelihood."),
    Metric(
        "cosine_phi_task",
        "-",
        "Cosine between phi(s_t) and the task under which s_t was reached; near 1, "
        "the features tell the tasks apart.",
    ),
    Metric("knn_distance", "feature units", "Mean distance to the k nearest."),
    Metric(
        "distance_scale",
        "feature units",
        "Running mean of those distances, by which they are divided.",
    ),
)
EVALUATION = (
    Metric(
        "eval_return_mean",
        "points",
        "Mean over full games of the sum of the unclipped reward of the task: the score, "
        "unless `--task` says otherwise.",
    ),
    Metric("eval_return_std", "points", "Standard deviation over those games."),
    Metric(
        "eval_score_mean", "points", "Mean score of those games, whatever the task."
    ),
    Metric("eval_length_mean", "agent steps", "Mean length of those games."),
    Metric(
        "eval_human_normalized",
        "-",
        "(mean score - random) / (human - random); NaN for games without a table, or "
        "games cut before 108,000 frames.",
    ),
)

PRETRAIN_COLUMNS = tuple(m.name for m in COUNTERS + LEARNING + PRETRAINING)
FINETUNE_COLUMNS = tuple(m.name for m in COUNTERS + LEARNING + EVALUATION)
# The groups by the heading that explains them.
GROUPS = {
    "Progress, in every stage": COUNTERS,
    "Learning, in every stage": LEARNING,
    "Pretraining only": PRETRAINING,
    "Fine-tuning only, in the rows after which full games were played": EVALUATION,
}
ALL = tuple(itertools.chain.from_iterable(GROUPS.values()))


def to_markdown() -> str:
    """Returns a table for each group of metrics, as docs/metrics.md shows them."""
    lines = []
    for heading, group in GROUPS.items():
        lines += [f"## {heading}", "", "| metric | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in group]
        lines.append("")
    return "\n".join(lines)


class RunningSums(NamedTuple):
    """Sums of metrics on the device, read and emptied when a row is written."""

    sums: dict[str, jax.Array]  # each [] float32
    count: jax.Array  # [] int32, updates summed.


def init_sums(names: Sequence[str]) -> RunningSums:
    """Returns sums of nothing."""
    return RunningSums(
        sums={name: jnp.zeros((), jnp.float32) for name in names},
        count=jnp.zeros((), jnp.int32),
    )


def add_to_sums(running: RunningSums, values: Mapping[str, jax.Array]) -> RunningSums:
    """Adds the metrics of one update; `values` must hold exactly the same names."""
    if set(values) != set(running.sums):
        raise ValueError(
            f"Expected metrics {sorted(running.sums)}, got {sorted(values)}."
        )
    return RunningSums(
        sums={name: running.sums[name] + values[name] for name in running.sums},
        count=running.count + 1,
    )


def means(running: RunningSums) -> dict[str, float]:
    """Returns the mean of each metric on the host; NaN where nothing was summed."""
    running = jax.device_get(running)
    count = int(running.count)
    return {
        name: float(value) / count if count else math.nan
        for name, value in running.sums.items()
    }


class MetricsWriter:
    """Writes rows to `metrics.csv` and, where wanted, to TensorBoard events.

    A resumed stage keeps the rows up to the step it resumes from and drops later ones,
    so the file is the same as that of a run that was never interrupted.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        columns: Sequence[str],
        *,
        resume_agent_steps: int = 0,
        tensorboard: bool = True,
        wandb_run: Any = None,
    ):
        """Opens the files.

        Args:
          folder: The stage's folder, which exists.
          columns: Names of the columns; the first is `agent_steps`.
          resume_agent_steps: Rows of later steps are dropped.
          tensorboard: Whether event files are written as well.
          wandb_run: From `tracking.start_wandb`, if rows go to W&B too.

        Raises:
          ValueError: The file on disk has other columns.
        """
        self._columns = list(columns)
        self._path = folder / FILE_NAME
        kept = self._kept_rows(resume_agent_steps)
        with self._path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self._columns)
            writer.writerows(kept)
        self._wandb_run = wandb_run
        self._events = None
        if tensorboard:
            import tensorboardX  # Takes a second to import, and only runs write events.

            self._events = tensorboardX.SummaryWriter(
                str(folder), purge_step=resume_agent_steps, write_to_disk=True
            )

    def _kept_rows(self, resume_agent_steps: int) -> list[list[str]]:
        if resume_agent_steps <= 0 or not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            rows = list(csv.reader(file))
        if not rows or rows[0] != self._columns:
            raise ValueError(
                f"{self._path} has columns {rows[:1]}, expected {self._columns}."
            )
        # A row cut short by a crash has fewer cells; it is written again.
        whole = [row for row in rows[1:] if len(row) == len(self._columns)]
        return [row for row in whole if int(row[0]) <= resume_agent_steps]

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row; a column that `row` lacks is NaN.

        Raises:
          ValueError: `row` has a name that is no column.
        """
        unknown = set(row) - set(self._columns)
        if unknown:
            raise ValueError(f"No such columns: {sorted(unknown)}.")
        values = {name: row.get(name, math.nan) for name in self._columns}
        # Opened anew for each row: a crash loses none, and a deleted or full folder
        # shows at the row where it happens.
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values.values())
        steps = int(values["agent_steps"])
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        if self._events is not None:
            for name, value in known.items():
                self._events.add_scalar(name, value, steps)
            self._events.flush()
        if self._wandb_run is not None:
            self._wandb_run.log(known, step=steps)

    def close(self) -> None:
        """Closes the event file, and the W&B run."""
        if self._events is not None:
            self._events.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


def read_metrics(path: pathlib.Path) -> dict[str, list[float]]:
    """Reads a `metrics.csv` into columns of floats."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    return {
        name: [float(row[index]) for row in rows[1:]]
        for index, name in enumerate(rows[0])
    }
