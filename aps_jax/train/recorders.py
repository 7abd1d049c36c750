"""Writes metrics and checkpoints of a stage, and resumes from the newest checkpoint."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax.parallel import interrupts, processes
from aps_jax.runs import checkpoints, folders, machine, metrics, snapshots, tracking
from aps_jax.runs import progress as progress_lib
from aps_jax.train import loop

_STOP_EVERY = 8  # iterations after which several processes agree on whether to stop
_RETRY_SECONDS = 10.0  # between tries to write what a finished stage must leave
# Errors that all processes raise at the same step.
_AGREED = (interrupts.Interrupted, loop.NonFinite)


class Runs(NamedTuple):
    """One run, or many seeds of it at once.

    Many seeds share a folder for lock and checkpoints. Each has a folder of its own for
    rows and result, and for its agent once the stage is finished.
    """

    workdir: pathlib.Path  # of lock and checkpoints
    configs: Mapping[pathlib.Path, config_lib.Config]  # by the folder of each seed

    @property
    def config(self) -> config_lib.Config:
        """The values of all, with the first seed."""
        return next(iter(self.configs.values()))

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of the states' leading axis."""
        return [config.seed for config in self.configs.values()]

    @property
    def shared_seeds(self) -> list[int] | None:
        """The seeds of many at once, as their `config.json` names them."""
        return self.seeds if len(self.configs) > 1 else None


def seed_folder(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """Returns where in a folder of several seeds one of them is."""
    return folder / f"seed_{seed}"


def make_runs(
    config: config_lib.Config,
    workdir: folders.PathLike,
    seeds: Sequence[int] = (),
) -> Runs:
    """Describes the runs of a stage.

    Args:
      config: The values of all.
      workdir: Folder of one run; of many seeds each has a folder in it.
      seeds: Seeds at once; the config's alone by default.

    Raises:
      ValueError: Many seeds ask for what one device or one process cannot do for many.
    """
    workdir = folders.as_path(workdir)
    if len(seeds) < 2:
        return Runs(workdir, {workdir: config})
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Seeds at once must differ, got {list(seeds)}.")
    problems = {
        "num_devices": (config.num_devices > 1, "they share one device"),
        "wandb": (config.report.wandb, "it takes one run of a process at a time"),
        "keep_best": (config.report.keep_best, "they share their checkpoints"),
    }
    for option, (is_given, why) in problems.items():
        if is_given:
            raise ValueError(
                f"Many seeds at once cannot have --{option}, since {why}: leave it "
                "out, or give --seeds for --num_seeds."
            )
    if processes.num_processes() > 1:
        raise ValueError(
            "Many seeds at once are for one process: give --seeds for --num_seeds."
        )
    return Runs(
        workdir,
        {
            seed_folder(workdir, seed): config_lib.replace_options(config, seed=seed)
            for seed in seeds
        },
    )


class Recorder:
    """Writes metrics and checkpoints of a stage; resumes from the newest checkpoint.

    A disk that cannot be written is no reason to end a stage that runs: it is warned of
    and tried again with every row.
    """

    def __init__(
        self,
        runs: Runs,
        columns: tuple[str, ...],
        session: loop.Session,
        lock: folders.RunLock | None,
        warn: Callable[[str], None],
        stop: interrupts.StopRequests | None,
    ):
        """Prepares to record a session; `resume` opens the files.

        Args:
          runs: Whose session it is.
          columns: Of `metrics.csv`.
          session: Not stepped yet.
          lock: On the folder, in the first process.
          warn: Is told what goes wrong and does not end the stage.
          stop: Requests to stop.
        """
        self._runs, self._columns, self._session = runs, columns, session
        self._lock, self._warn, self._stop = lock, warn, stop
        self._workdir = runs.workdir
        self._report = runs.config.report
        self._frame_skip = runs.config.observation.frame_skip
        self._checkpointer = checkpoints.Checkpointer(
            self._workdir / folders.CHECKPOINTS_NAME,
            policy=checkpoints.Policy(
                keep_last=self._report.keep_checkpoints,
                keep_every=-(-self._report.keep_every_frames // self._frame_skip),
                keep_best=self._report.keep_best,
            ),
            warn=warn,
        )
        self._saved: int | None = None  # number of the newest checkpoint
        self._is_behind = False  # whether one that was due is not on disk
        self._writers: list[metrics.MetricsWriter] = []  # of the first process
        # JSON values that a checkpoint keeps beside the arrays.
        self.facts: dict[str, Any] = {}
        # The newest row of metrics of each seed.
        self.last_rows: list[dict[str, Any]] = [{} for _ in runs.seeds]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace
    ) -> None:
        is_agreed = error is None or isinstance(error, _AGREED)
        if processes.num_processes() > 1 and not is_agreed:
            # The others are elsewhere: what needs them all would never come to an end.
            return
        try:
            if error is None:
                patiently(self._settle, self._warn, self._stop)
                self._export()
            elif isinstance(error, loop.NonFinite):
                self._dump(error)
            elif isinstance(error, interrupts.Interrupted | loop.EnvironmentFailure):
                self._save_at_the_end(error)
        finally:
            for writer in self._writers:
                writer.close()
            self._checkpointer.close()

    def resume(self) -> dict[str, Any]:
        """Takes the session to the newest checkpoint, if there is one.

        Returns:
          The facts of that checkpoint; empty for a new run.

        Raises:
          ValueError: The folder cannot be written, has not room for a checkpoint, or
            holds one of another agent.
        """
        processes.broadcast_from_primary(self._check_disk)
        session = self._session
        templates = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {**self._items(), "replay": session.rollout.replay},
        )
        if processes.broadcast_from_primary(self._has_checkpoint):
            # Not both at once: the one on disk needs the place.
            session.free_replay()
        found = self._checkpointer.restore_newest(
            templates, optional=("replay",), set_damaged_aside=True
        )
        if found is not None:
            self._restore(found.metadata, found.items, templates["replay"])
        if processes.is_primary():
            kept = self.facts.get("num_rows", [0] * len(self._runs.seeds))
            self._writers = [
                metrics.MetricsWriter(
                    folder,
                    self._columns,
                    kept_rows=num_rows,
                    wandb_run=(
                        tracking.start_wandb(config, folder)
                        if config.report.wandb
                        else None
                    ),
                )
                for (folder, config), num_rows in zip(
                    self._runs.configs.items(), kept, strict=True
                )
            ]
        return self.facts

    def _check_disk(self) -> None:
        items, ring = self._items(), self._session.rollout.replay
        machine.check_disk(
            self._workdir,
            fixed_bytes=_num_bytes(items),
            replay_bytes=_num_bytes(ring) if self._report.checkpoint_replay else 0,
            kept=self._report.keep_checkpoints,
            warn=self._warn,
        )

    def _has_checkpoint(self) -> bool:
        self._checkpointer.clean()
        return bool(self._checkpointer.steps())

    def _items(self) -> dict[str, Any]:
        session = self._session
        rollout = session.rollout
        return {
            "agent": session.state,
            "loop": (rollout.actor, rollout.episodes, session.sums),
        }

    def _restore(
        self, facts: dict[str, Any], items: dict[str, Any], replay: Any
    ) -> None:
        session = self._session
        self.facts, self.last_rows = facts, facts["last_rows"]
        session.state = items["agent"]
        actor, episodes, session.sums = items["loop"]
        session.iteration = facts["agent_steps"] // session.num_envs
        self._saved = session.agent_steps
        if "replay" not in items:
            items["replay"] = _zeros(replay)
            facts["replay_since"] = session.agent_steps
        session.rollout = loop.RolloutState(actor, items["replay"], episodes)
        if isinstance(session.pool, loop.ResumablePool) and facts["environment"]:
            session.timestep = session.pool.set_state(facts["environment"])
        else:
            self._warn(
                f"resumed at agent step {session.agent_steps:,}. The emulators' state "
                "cannot be saved: new games begin, and all else goes on as it was."
            )

    def wait_for_refill(self, schedule: loop.Schedule, total: int) -> None:
        """Puts learning off after a checkpoint without replay, and says for how long.

        Until there is as much as when learning first began, but for no more than a
        quarter of what is still to be played.

        Args:
          schedule: When learning begins in a run that is not interrupted.
          total: Iterations of the whole stage.
        """
        session = self._session
        since = self.facts.get("replay_since", 0)
        if not since:
            return
        left = total * session.num_envs - since
        session.learn_from = since + min(schedule.start, left // 4)
        waiting = session.learn_from - session.agent_steps
        if waiting > 0:
            self._warn(
                f"the checkpoint has no replay: learning goes on after {waiting:,} "
                f"agent steps, at {session.learn_from:,}."
            )

    def is_row_due(self) -> bool:
        """Returns whether a row of metrics belongs to the last step."""
        return self._is_due(self._report.report_agent_steps)

    def _is_due(self, every: int) -> bool:
        session = self._session
        return loop.is_due(every, session.agent_steps, session.num_envs)

    def steps_to_go(self, total: int) -> int:
        """Returns after how many iterations the next row, checkpoint or end is due."""
        session = self._session
        left = [
            -(-(every - session.agent_steps % every) // session.num_envs)
            for every in (
                self._report.report_agent_steps,
                self._report.checkpoint_agent_steps,
            )
        ]
        return max(1, min(total - session.iteration, *left))

    def record(
        self,
        *,
        is_last: bool,
        progress: progress_lib.Silent,
        more: Sequence[dict[str, float]] | None = None,
    ) -> None:
        """Writes a row and a checkpoint where they are due, and shows progress.

        Args:
          is_last: Whether the stage ends here.
          progress: Where to show progress.
          more: Of each seed, what its row has besides the session's.

        Raises:
          interrupts.Interrupted: A stop was requested.
        """
        session = self._session
        is_row = self.is_row_due() or is_last
        if is_row:
            others = more or [{}] * len(session.seeds)
            rows = zip(session.rows(), others, strict=True)
            self.write([row | other for row, other in rows])
            self._is_behind = processes.broadcast_from_primary(lambda: self._is_behind)
        failure = self._checkpointer.failure()
        if failure is not None:
            self._complain(failure)
        is_save_due = self._is_due(self._report.checkpoint_agent_steps)
        if is_save_due or is_last or (is_row and self._is_behind):
            self.save()
        found = [row.get("episode_return") for row in self.last_rows]
        known = [x for x in found if x is not None]
        progress.tick(
            session.agent_steps * self._frame_skip * len(session.seeds),
            float(np.mean(known)) if known else None,
        )
        is_asked = processes.num_processes() == 1 or (
            session.iteration % _STOP_EVERY == 0
        )
        if self._stop is not None and is_asked and not is_last:
            _check_stop(self._stop)

    def write_snapshot(self, visited: dict[str, np.ndarray]) -> None:
        """Writes where the features are, or warns: pictures are no reason to end."""
        if not processes.is_primary():
            return
        steps = self._session.agent_steps
        parts = self._session.parts(visited)
        for folder, part in zip(self._runs.configs, parts, strict=True):
            try:
                snapshots.write_snapshot(folder, steps, part)
            except OSError as error:
                self._warn(f"no feature snapshot at agent step {steps:,}: {error}.")

    def write(self, rows: Sequence[dict[str, float]]) -> None:
        """Writes one row of metrics of each seed."""
        self.last_rows = [loop.without_nan(row) for row in rows]
        is_evaluation = "eval_return_mean" in rows[0]
        score = rows[0]["eval_return_mean" if is_evaluation else "episode_return"]
        is_better_known = self.facts.get("is_evaluated") and not is_evaluation
        if not (math.isnan(score) or is_better_known):
            self.facts["score"] = score
            self.facts["is_evaluated"] = is_evaluation
            self.facts["scored_agent_steps"] = self._session.agent_steps
        if processes.is_primary():
            try:
                self._ensure_folder()
                for writer, row in zip(self._writers, rows, strict=True):
                    writer.write(row)
            except (OSError, ValueError) as error:
                self._complain(error)
        if is_evaluation and self._report.keep_best:
            self._saved = None  # One of this step may lack the score.
            self.save()

    def _ensure_folder(self) -> None:
        """Makes the folder anew if somebody deleted it."""
        if self._lock is not None and self._lock.ensure():
            self._warn(f"{self._workdir} was deleted, and has been made anew.")
        for folder in self._runs.configs:
            folder.mkdir(parents=True, exist_ok=True)

    def _complain(self, error: Exception) -> None:
        """Warns that something could not be written."""
        self._is_behind = True
        self._warn(
            f"cannot write to {self._workdir} at agent step "
            f"{self._session.agent_steps:,} ({error}). The stage goes on and tries "
            f"again; the last good checkpoint {self._last_good()}."
        )

    def _last_good(self) -> str:
        numbers = self._checkpointer.steps()
        return f"is of agent step {numbers[-1]:,}" if numbers else "does not exist"

    def save(self) -> None:
        """Begins to write a checkpoint of the session, unless there is one of it.

        Raises:
          loop.NonFinite: Something is not finite; nothing is written.
        """
        session = self._session
        if self._saved == session.agent_steps and not self._is_behind:
            return
        session.check_finite()
        session.prepare_save()
        self.facts["agent_steps"] = session.agent_steps
        if (
            self.facts.get("is_evaluated")
            and self.facts["scored_agent_steps"] != session.agent_steps
        ):
            self.facts["score"] = None  # Full games say nothing of a later agent.
        if self._writers:
            self.facts["num_rows"] = [writer.num_rows for writer in self._writers]
        self.facts["last_rows"] = self.last_rows
        self.facts["environment"] = (
            session.pool.get_state()
            if isinstance(session.pool, loop.ResumablePool)
            and session.timestep is not None
            else None
        )
        items = self._items()
        if self._report.checkpoint_replay:
            items["replay"] = session.rollout.replay
        self._is_behind = False
        if not processes.broadcast_from_primary(self._sync):
            return
        try:
            facts = {**self.facts, **self._origin(self._runs.config)}
            self._checkpointer.save(session.agent_steps, items, facts)
            self._saved = session.agent_steps
        except (OSError, ValueError) as error:
            self._complain(error)

    def _origin(self, config: config_lib.Config) -> dict[str, Any]:
        """Returns what whoever loads a checkpoint wants to know of it."""
        return {
            "config": config_lib.to_dict(config),
            "versions": folders.versions(),
            "git_commit": folders.git_commit(),
            "num_actions": self._session.pool.num_actions,
            "observation": self._session.pool.observation,
        }

    def _sync(self) -> bool:
        """Flushes the rows, which a checkpoint counts; returns whether that worked."""
        try:
            self._ensure_folder()
            for writer in self._writers:
                writer.sync()
        except (OSError, ValueError) as error:
            self._complain(error)
            return False
        return True

    def _settle(self) -> None:
        """Brings the last checkpoint to disk.

        Raises:
          OSError: It could not.
        """
        self._is_behind = processes.broadcast_from_primary(lambda: self._is_behind)
        self.save()
        failure = processes.broadcast_from_primary(self._finish)
        if failure is not None:
            self._is_behind = True
            raise OSError(failure)

    def _finish(self) -> str | None:
        """Waits for the checkpoint under way; returns why it is not on disk."""
        try:
            self._checkpointer.wait_until_finished()
        except OSError as error:
            return str(error)
        return f"{self._workdir} cannot be written" if self._is_behind else None

    def _export(self) -> None:
        """Leaves each of many seeds its agent in its own folder."""
        if len(self._runs.seeds) == 1:
            return
        for place, (folder, config) in enumerate(self._runs.configs.items()):
            facts = {  # A list has an entry for each seed.
                name: fact[place : place + 1] if isinstance(fact, list) else fact
                for name, fact in self.facts.items()
            }
            facts |= {**self._origin(config), "environment": None}
            items = {"agent": self._session.part(self._session.state, place)}
            own = checkpoints.Checkpointer(
                folder / folders.CHECKPOINTS_NAME, warn=self._warn
            )

            def write(own=own, items=items, facts=facts) -> None:
                own.save(self._session.agent_steps, items, facts)
                own.wait_until_finished()

            patiently(write, self._warn, self._stop)
            own.close()

    def _save_at_the_end(self, error: BaseException) -> None:
        """Saves what there is before an error ends the stage, and says so in it.

        Raises:
          loop.NonFinite: Something is not finite; its batch was written instead.
        """
        if isinstance(error, loop.EnvironmentFailure):
            # Its pool is in no state to go on from.
            self._session.timestep = None
        try:
            self._settle()
            done = f"a checkpoint of agent step {self._session.agent_steps:,} was saved"
        except loop.NonFinite as bad:
            self._dump(bad)
            raise
        except OSError as failure:
            done = f"no checkpoint could be saved ({failure})"
        error.args = (f"{error}; {done}",)

    def _dump(self, error: loop.NonFinite) -> None:
        """Writes the batch of what is not finite, and says in the error where it is."""
        where = processes.broadcast_from_primary(lambda: self._write_batch(error.batch))
        error.args = (f"{error} {where}",)

    def _write_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Writes a batch; says where it is, and which checkpoint is the last."""
        path = self._workdir / f"nonfinite_{self._session.agent_steps}.npz"
        with contextlib.suppress(OSError):  # Was warned of, or is in what is said.
            self._checkpointer.wait_until_finished()
        try:
            np.savez_compressed(path, allow_pickle=False, **batch)
            where = f"The batch is in {path}."
        except OSError as failure:
            where = f"The batch could not be written ({failure})."
        return f"{where} The last good checkpoint {self._last_good()}."


def _check_stop(stop: interrupts.StopRequests) -> None:
    """Stops all processes together."""
    if processes.any_process(stop.is_requested()):
        stop.obey()


def _zeros(templates: Any) -> Any:
    """Allocates zeros of the templates' shapes, types and shardings."""
    return jax.jit(
        lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), templates),
        out_shardings=jax.tree.map(lambda x: x.sharding, templates),
    )()


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def patiently(
    write: Callable[[], None],
    warn: Callable[[str], None],
    stop: interrupts.StopRequests | None,
) -> None:
    """Writes what a finished stage must leave, however long the disk is full.

    Raises:
      interrupts.Interrupted: A stop was requested meanwhile.
    """
    while True:
        try:
            return write()
        except OSError as error:
            warn(f"{error}; trying again every {_RETRY_SECONDS:.0f} s.")
        for _ in range(int(_RETRY_SECONDS / 0.2)):  # In all processes as often.
            if stop is not None:
                _check_stop(stop)
            time.sleep(0.2)
