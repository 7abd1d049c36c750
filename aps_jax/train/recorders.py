"""Writes metrics and checkpoints of a stage, and resumes from the newest checkpoint."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax.parallel import interrupts, processes
from aps_jax.runs import checkpoints, folders, machine, metrics, snapshots, tracking
from aps_jax.runs import progress as progress_lib
from aps_jax.train import loop
from aps_jax.train import seeds as seeds_lib

_STOP_EVERY = 8  # iterations after which several processes agree on whether to stop
_RETRY_SECONDS = 10.0  # between tries to write what a finished stage must leave


class Recorder:
    """Writes metrics and checkpoints of a stage; resumes from the newest checkpoint.

    A disk that cannot be written is no reason to end a stage that runs: it is warned of
    and tried again with every row.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        columns: tuple[str, ...],
        session: loop.Session,
        config: config_lib.Config,
        lock: folders.RunLock | None,
        warn: Callable[[str], None],
        stop: interrupts.StopRequests | None,
    ):
        report = config.report
        self._stop = stop
        self._warn = warn
        self._lock = lock
        self._config = config
        self._workdir = workdir
        self._columns = columns
        self._session = session
        self._has_replay = report.checkpoint_replay
        self.report = report
        self._origin: dict[str, Any] = {
            "config": config_lib.to_dict(config),
            "versions": folders.versions(),
            "git_commit": folders.git_commit(),
            "num_actions": session.pool.num_actions,
            "observation": session.pool.observation,
        }
        self._checkpointer = checkpoints.Checkpointer(
            workdir / folders.CHECKPOINTS_NAME,
            policy=checkpoints.Policy(
                keep_last=report.keep_checkpoints,
                keep_every=-(
                    -report.keep_every_frames // config.observation.frame_skip
                ),
                keep_best=report.keep_best,
            ),
            warn=warn,
        )
        self._saved: int | None = None  # number of the newest checkpoint
        self._is_behind = False  # whether one that was due is not on disk
        self._writer: metrics.MetricsWriter | None = None  # of the first process
        self.facts: dict[str, Any] = {}
        self.last_row: dict[str, float] = {}

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
                self.settle()
            elif isinstance(error, interrupts.Interrupted | loop.EnvironmentFailure):
                self._save_at_the_end(error)
            elif isinstance(error, loop.NonFinite):
                self.dump(error)
        finally:
            self.close()

    def settle(self) -> None:
        """Brings the last checkpoint to disk, however long it is full."""
        _patiently(self._settle, self._warn, self._stop)

    def close(self) -> None:
        """Ends what writes."""
        if self._writer is not None:
            self._writer.close()
        self._checkpointer.close()

    @property
    def num_seeds(self) -> int:
        """How many runs are recorded."""
        return 1

    def check_disk(self, num_seeds: int = 1) -> None:
        """Checks that there is room for the checkpoints of so many runs like this.

        Raises:
          ValueError: The folder cannot be written, or has not room for a checkpoint.
        """
        parts, ring = self._parts(), self._session.rollout.replay
        machine.check_disk(
            self._workdir,
            fixed_bytes=num_seeds
            * (_num_bytes(parts["agent"]) + _num_bytes(parts["loop"])),
            replay_bytes=num_seeds * _num_bytes(ring) if self._has_replay else 0,
            kept=self._origin["config"]["report"]["keep_checkpoints"],
            warn=self._warn,
        )

    def resume(self) -> dict[str, Any]:
        """Takes the session to the newest checkpoint, if there is one.

        Returns:
          The facts of that checkpoint; empty for a new run.

        Raises:
          ValueError: The folder cannot be written, has not room for a checkpoint, or
            holds one of another agent.
        """
        processes.broadcast_from_primary(self.check_disk)
        return self.restore()

    def restore(self) -> dict[str, Any]:
        """Does what `resume` does, in a folder with room enough."""
        session = self._session
        parts = self._parts()
        templates = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {**parts, "replay": session.rollout.replay},
        )
        if processes.broadcast_from_primary(self.numbers):
            # Not both at once: the one on disk needs the place.
            session.free_replay()
        del parts
        found = self._checkpointer.restore_newest(
            templates, optional=("replay",), set_damaged_aside=True
        )
        if found is not None:
            self._restore(found.metadata, found.items, templates["replay"])
        if processes.is_primary():
            self._writer = metrics.MetricsWriter(
                self._workdir,
                self._columns,
                kept_rows=self.facts.get("num_rows", 0),
                wandb_run=(
                    tracking.start_wandb(self._config, self._workdir)
                    if self._config.report.wandb
                    else None
                ),
            )
        return self.facts

    def numbers(self) -> list[int]:
        """Tidies up, and returns the agent steps of the checkpoints, oldest first."""
        self._checkpointer.clean()
        return self._checkpointer.steps()

    def go_back(self, number: int) -> None:
        """Deletes what is newer than a checkpoint that the run goes back to."""
        newer = [there for there in self.numbers() if there > number]
        if newer:
            self._warn(
                f"goes back to agent step {number:,}, where all seeds have one; "
                f"that of {newer[-1]:,} is deleted."
            )
            self._checkpointer.delete(newer)

    @property
    def is_save_due(self) -> bool:
        """Whether a checkpoint belongs to the last step."""
        session = self._session
        return loop.is_due(
            self.report.checkpoint_agent_steps, session.agent_steps, session.num_envs
        )

    def is_row_due(self, values: config_lib.ReportConfig) -> bool:
        """Returns whether a row of metrics belongs to the last step."""
        session = self._session
        return loop.is_due(
            values.report_agent_steps, session.agent_steps, session.num_envs
        )

    def _parts(self) -> dict[str, Any]:
        session = self._session
        rollout = session.rollout
        return {
            "agent": session.state,
            "loop": (rollout.actor, rollout.episodes, session.sums),
        }

    def _restore(
        self, facts: dict[str, Any], parts: dict[str, Any], replay: Any
    ) -> None:
        session = self._session
        self.facts = facts
        session.state = parts["agent"]
        actor, episodes, session.sums = parts["loop"]
        session.iteration = facts["agent_steps"] // session.num_envs
        self._saved = session.agent_steps
        self.last_row = facts["last_row"]
        if "replay" not in parts:
            parts["replay"] = _zeros(replay)
            facts["replay_since"] = session.agent_steps
        session.rollout = loop.RolloutState(actor, parts["replay"], episodes)
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

    def record(
        self,
        values: config_lib.ReportConfig,
        *,
        is_last: bool,
        progress: progress_lib.Silent,
    ) -> None:
        """Writes a row and a checkpoint where they are due, and shows progress.

        Raises:
          interrupts.Interrupted: A stop was requested.
        """
        self.write_due(values, is_last=is_last)
        frames = self._session.agent_steps * self._config.observation.frame_skip
        progress.tick(frames, self.last_row.get("episode_return"))
        is_asked = processes.num_processes() == 1 or (
            self._session.iteration % _STOP_EVERY == 0
        )
        if self._stop is not None and is_asked and not is_last:
            _check_stop(self._stop)

    def write_due(self, values: config_lib.ReportConfig, *, is_last: bool) -> None:
        """Writes a row and a checkpoint where they are due."""
        is_row = self.is_row_due(values) or is_last
        if is_row:
            self.write(self._session.row())
            self._is_behind = processes.broadcast_from_primary(lambda: self._is_behind)
        failure = self._checkpointer.failure()
        if failure is not None:
            self._complain(failure)
        if self.is_save_due or is_last or (is_row and self._is_behind):
            self.save()

    def write_snapshot(self, visited: dict[str, np.ndarray]) -> None:
        """Writes where the features are, or warns: pictures are no reason to end."""
        if not processes.is_primary():
            return
        steps = self._session.agent_steps
        try:
            snapshots.write_snapshot(self._workdir, steps, visited)
        except OSError as error:
            self._warn(f"no feature snapshot at agent step {steps:,}: {error}.")

    def _complain(self, error: Exception) -> None:
        """Warns that something could not be written."""
        self._is_behind = True
        numbers = self._checkpointer.steps()
        last = f"of agent step {numbers[-1]:,}" if numbers else "missing yet"
        self._warn(
            f"cannot write to {self._workdir} at agent step "
            f"{self._session.agent_steps:,} ({error}). The stage goes on and tries "
            f"again; the last good checkpoint is {last}."
        )

    def write(self, row: dict[str, float]) -> None:
        """Writes one row of metrics."""
        self.last_row = loop.without_nan(row)
        is_evaluation = "eval_return_mean" in row
        score = row["eval_return_mean" if is_evaluation else "episode_return"]
        is_better_known = self.facts.get("is_evaluated") and not is_evaluation
        if not (math.isnan(score) or is_better_known):
            self.facts["score"] = score
            self.facts["is_evaluated"] = is_evaluation
            self.facts["scored_agent_steps"] = self._session.agent_steps
        if processes.is_primary():
            try:
                self._ensure_folder()
                assert self._writer is not None
                self._writer.write(row)
            except (OSError, ValueError) as error:
                self._complain(error)
        if is_evaluation and self._config.report.keep_best:
            self._saved = None  # One of this step may lack the score.
            self.save()

    def _ensure_folder(self) -> None:
        """Makes the folder anew if somebody deleted it."""
        if self._lock is not None and self._lock.ensure():
            self._warn(f"{self._workdir} was deleted, and has been made anew.")

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
        if self._writer is not None:
            self.facts["num_rows"] = self._writer.num_rows
        self.facts["last_row"] = self.last_row
        self.facts["environment"] = (
            session.pool.get_state()
            if isinstance(session.pool, loop.ResumablePool)
            and session.timestep is not None
            else None
        )
        parts = self._parts()
        if self._has_replay:
            parts["replay"] = session.rollout.replay
        self._is_behind = False
        if not processes.broadcast_from_primary(self._sync):
            return
        try:
            self._checkpointer.save(
                session.agent_steps, parts, {**self.facts, **self._origin}
            )
            self._saved = session.agent_steps
        except (OSError, ValueError) as error:
            self._complain(error)

    def _sync(self) -> bool:
        """Flushes the rows, which a checkpoint counts; returns whether that worked."""
        try:
            self._ensure_folder()
            assert self._writer is not None
            self._writer.sync()
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

    def _save_at_the_end(self, error: BaseException) -> None:
        """Saves what there is before an error ends the stage, and says so in it."""
        if isinstance(error, loop.EnvironmentFailure):
            # Its pool is in no state to go on from.
            self._session.timestep = None
        error.args = (f"{error}; {self.save_the_last()}",)

    def save_the_last(self) -> str:
        """Saves what there is; returns what came of it.

        Raises:
          loop.NonFinite: Something is not finite; its batch was written instead.
        """
        try:
            self._settle()
        except loop.NonFinite as bad:
            self.dump(bad)
            raise
        except OSError as failure:
            return f"no checkpoint could be saved ({failure})"
        return f"a checkpoint of agent step {self._session.agent_steps:,} was saved"

    def dump(self, error: loop.NonFinite) -> None:
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
        numbers = self._checkpointer.steps()
        last = f"is of agent step {numbers[-1]:,}" if numbers else "does not exist"
        return f"{where} The last good checkpoint {last}."


# Errors that all processes raise at the same step.
_AGREED = (interrupts.Interrupted, loop.NonFinite)


class SeedsRecorder:
    """Records the many seeds of one session, each in its own folder."""

    def __init__(
        self,
        recorders: Sequence[Recorder],
        session: seeds_lib.SeedsSession,
        stop: interrupts.StopRequests | None,
    ):
        self._recorders = recorders
        self._session = session
        self._stop = stop

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace
    ) -> None:
        try:
            if error is None:
                for recorder in self._recorders:
                    recorder.settle()
            elif isinstance(
                error,
                interrupts.Interrupted | loop.EnvironmentFailure | loop.NonFinite,
            ):
                self._save_at_the_end(error)
        finally:
            for recorder in self._recorders:
                recorder.close()

    @property
    def num_seeds(self) -> int:
        """How many runs are recorded."""
        return len(self._recorders)

    def resume(self) -> None:
        """Takes all seeds to the newest checkpoint that each of them has.

        Raises:
          ValueError: As `Recorder.resume`; or the seeds stand further apart than a
            process that dies can leave them; or checkpoints are damaged, or differ in
            whether they hold the replay.
        """
        self._recorders[0].check_disk(self.num_seeds)
        self._meet()
        for recorder in self._recorders:
            recorder.restore()
        # What each checkpoint is of, and since when its replay has been filled.
        found = [
            (r.facts.get("agent_steps", 0), r.facts.get("replay_since", 0))
            for r in self._recorders
        ]
        if len(set(found)) > 1:
            steps = ", ".join(f"{at:,}" for at, _ in found)
            raise ValueError(
                f"The seeds {self._names()} have no common checkpoint that is whole "
                f"and of one kind (agent steps {steps}): the same command tries "
                "again with older ones, and --seeds continues them one after another."
            )

    def _meet(self) -> None:
        """Goes back to the newest checkpoint that all seeds have, where some have more.

        Seeds write one after the other, so that a process that dies leaves some a
        checkpoint ahead; the start of a run counts as one.
        """
        numbers = [{0, *recorder.numbers()} for recorder in self._recorders]
        common = max(set.intersection(*numbers))
        report, num_envs = self._recorders[0].report, self._session.num_envs
        interval = -(-report.checkpoint_agent_steps // num_envs) * num_envs
        if max(map(max, numbers)) - common > interval:
            steps = ", ".join(f"{max(each):,}" for each in numbers)
            raise ValueError(
                f"The seeds {self._names()} are at agent steps {steps}, too far apart "
                "to go on together: continue them one after another with --seeds."
            )
        for recorder in self._recorders:
            recorder.go_back(common)

    def _names(self) -> str:
        return ", ".join(map(str, self._session.seeds))

    def wait_for_refill(self, schedule: loop.Schedule, total: int) -> None:
        """Puts learning off as `Recorder.wait_for_refill`, for all seeds alike."""
        self._recorders[0].wait_for_refill(schedule, total)

    def is_row_due(self, values: config_lib.ReportConfig) -> bool:
        """Returns whether a row of metrics belongs to the last step."""
        return self._recorders[0].is_row_due(values)

    def write_snapshot(self, visited: dict[str, np.ndarray]) -> None:
        """Writes where the features of each seed are."""
        for index, recorder in enumerate(self._recorders):
            recorder.write_snapshot({name: x[index] for name, x in visited.items()})

    def record(
        self,
        values: config_lib.ReportConfig,
        *,
        is_last: bool,
        progress: progress_lib.Silent,
    ) -> None:
        """Writes rows and checkpoints where they are due, and shows progress.

        Raises:
          interrupts.Interrupted: A stop was requested.
          loop.NonFinite: A seed is not finite; the others have their rows.
        """
        bad: loop.NonFinite | None = None
        if is_last or self._recorders[0].is_save_due:
            self._session.prepare_save()
        for recorder in self._recorders:
            try:
                recorder.write_due(values, is_last=is_last)
            except loop.NonFinite as error:
                bad = bad or error
        if bad is not None:
            raise bad
        known = [
            value
            for recorder in self._recorders
            if (value := recorder.last_row.get("episode_return")) is not None
        ]
        progress.tick(
            self._session.agent_steps
            * self._session.pool.observation.frame_skip
            * self.num_seeds,
            float(np.mean(known)) if known else None,
        )
        if self._stop is not None and not is_last:
            self._stop.check()

    def _save_at_the_end(self, error: BaseException) -> None:
        """Saves what is finite of every seed before an error ends the stage.

        Raises:
          loop.NonFinite: A seed is not finite, where that was not the error.
        """
        if isinstance(error, loop.EnvironmentFailure):
            self._session.timestep = None
        self._session.prepare_save()
        done: dict[str, list[str]] = {}
        others: list[loop.NonFinite] = []
        for seed, recorder in zip(self._session.seeds, self._recorders, strict=True):
            if isinstance(error, loop.NonFinite) and error.seed == seed:
                recorder.dump(error)
                continue
            try:
                text = recorder.save_the_last()
            except loop.NonFinite as bad:
                text = str(bad)
                others.append(bad)
            done.setdefault(text, []).append(str(seed))
        said = [f"seed {', '.join(whose)}: {text}" for text, whose in done.items()]
        error.args = ("; ".join([str(error), *said]),)
        if others and not isinstance(error, loop.NonFinite):
            others[0].args = error.args
            raise others[0]


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


def _patiently(
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


def write_result(
    workdir: pathlib.Path,
    result: dict[str, Any],
    warn: Callable[[str], None],
    stop: interrupts.StopRequests | None,
) -> None:
    """Writes what a stage leaves in `result.json`, however long the disk is full.

    Raises:
      interrupts.Interrupted: A stop was requested meanwhile.
    """
    path = workdir / folders.RESULT_NAME
    processes.broadcast_from_primary(
        lambda: _patiently(lambda: folders.write_json(path, result), warn, stop)
    )
