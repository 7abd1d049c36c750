"""The stages of a run: pretraining without reward, and fine-tuning with it."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from aps_jax import agent as agent_lib
from aps_jax import (
    checkpoint,
    devices,
    envs,
    evaluation,
    game_tasks,
    hosts,
    interrupts,
    loop,
    metrics,
    replay,
    resources,
    rundir,
    snapshots,
    tasks,
    tracking,
    types,
)
from aps_jax import config as config_lib
from aps_jax import progress as progress_lib
from aps_jax import seeds as seeds_lib
from aps_jax.config import FRAME_SKIP

PRETRAIN = "pretrain"
FINETUNE = "finetune"


class Trained(NamedTuple):
    """An agent out of a folder, with all that is needed to use it."""

    config: config_lib.Config
    agent: agent_lib.Agent
    state: agent_lib.AgentState
    num_actions: int
    facts: dict[str, Any]  # of the checkpoint


def pretrain(
    config: config_lib.Config,
    workdir: pathlib.Path,
    *,
    constructor: loop.MakePool = envs.AtariPool,
    progress: progress_lib.Progress | None = None,
    stop: interrupts.StopRequests | None = None,
) -> dict[str, Any]:
    """Pretrains an agent on a game whose reward it never sees.

    APS, Alg. 1, https://arxiv.org/abs/2108.13956. The same call continues a run that was
    interrupted, and returns at once if the run is finished.

    Args:
      config: The run's values.
      workdir: Folder of this stage; made if it does not exist.
      constructor: Makes the environments, as `envs.AtariPool`.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What `result.json` holds. The newest checkpoint holds the agent.

    Raises:
      ValueError: The folder holds another run.
      loop.NonFinite: A loss or reward is not finite; nothing is saved after it but the
        batch that it was computed from.
      loop.EnvironmentFailure: The environments raised; a checkpoint was saved.
      interrupts.Interrupted: A stop was requested; a checkpoint was saved.
    """
    started = time.monotonic()
    mesh = devices.make_mesh(config.num_devices)
    resources.check_memory(config, is_pretraining=True)
    warn = _warning(progress)
    resources.check_cores(config, warn)
    values = config.pretrain
    num_envs = values.num_envs
    with contextlib.ExitStack() as held:
        pool = loop.make_pool(
            config, num_envs, loop.Stream.PRETRAIN_ACT, constructor, mesh
        )
        held.callback(pool.close)
        result = _open(
            workdir, stage=PRETRAIN, config=config, num_actions=pool.num_actions
        )
        if result is not None:
            return result
        lock = held.enter_context(rundir.RunLock(workdir)) if hosts.is_first() else None
        parts = loop.make_pretraining(config, pool, mesh)
        agent, ring, session = parts.agent, parts.ring, parts.session
        with _Recorder(
            workdir, metrics.PRETRAIN_COLUMNS, session, config, lock, warn, stop
        ) as recorder:
            recorder.resume(ring)
            stream = functools.partial(loop.stream_key, config.seed)
            _explore(
                config,
                parts,
                recorder,
                calibrate=loop.make_calibrate(
                    agent, ring, stream(loop.Stream.CALIBRATE), mesh
                ),
                visit=snapshots.make_visit(
                    agent, ring, stream(loop.Stream.SNAPSHOT), mesh
                ),
                progress=progress,
            )
            result = _pretrain_result(config, session, recorder, started)
        _write_result(workdir, result, warn, stop)
    return result


def pretrain_seeds(
    configs: Mapping[pathlib.Path, config_lib.Config],
    *,
    constructor: loop.MakePool = envs.AtariPool,
    progress: progress_lib.Progress | None = None,
    stop: interrupts.StopRequests | None = None,
) -> list[dict[str, Any]]:
    """Pretrains several seeds at once, on one device and with one pool (`seeds`).

    Every folder is written as `pretrain` would write it, and can be continued or used by
    itself. Seeds that are finished are left as they are; the others go on from the
    newest checkpoint that all of them have.

    Args:
      configs: The runs' values by folder; they differ in the seed alone.
      constructor: Makes the environments, as `envs.AtariPool`.
      progress: Where to show progress, of all seeds together; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What each folder's `result.json` holds.

    Raises:
      ValueError: The configs differ in more than the seed or name several devices, a
        folder holds another run, or the seeds stand too far apart.
      loop.NonFinite: A loss or reward of one seed is not finite. Of that seed nothing is
        saved but the batch; a checkpoint of every other was saved.
      loop.EnvironmentFailure: The environments raised; checkpoints were saved.
      interrupts.Interrupted: A stop was requested; checkpoints were saved.
    """
    started = time.monotonic()
    config = next(iter(configs.values()))
    seeds_lib.check_configs(list(configs.values()))
    resources.check_memory(config, is_pretraining=True, num_seeds=len(configs))
    warn = _warning(progress)
    resources.check_cores(config, warn)
    with contextlib.ExitStack() as held:

        def make_pool(run_seeds: Sequence[int]) -> loop.Pool:
            pool = loop.make_pool(
                config,
                config.pretrain.num_envs,
                loop.Stream.PRETRAIN_ACT,
                constructor,
                run_seeds=run_seeds,
            )
            held.callback(pool.close)
            return pool

        pool = make_pool([one.seed for one in configs.values()])
        results = {
            workdir: _open(
                workdir, stage=PRETRAIN, config=one, num_actions=pool.num_actions
            )
            for workdir, one in configs.items()
        }
        left = {w: one for w, one in configs.items() if results[w] is None}
        run_seeds = [one.seed for one in left.values()]
        if left and len(left) < len(configs):
            held.close()  # These environments are too many.
            pool = make_pool(run_seeds)
        if left:
            locks = [held.enter_context(rundir.RunLock(workdir)) for workdir in left]
            parts = seeds_lib.make_pretraining(config, run_seeds, pool)
            recorders = [
                _Recorder(
                    workdir,
                    metrics.PRETRAIN_COLUMNS,
                    session,
                    one,
                    lock,
                    functools.partial(_warn_of_seed, warn, one.seed),
                    stop,
                )
                for (workdir, one), session, lock in zip(
                    left.items(), parts.session.of_seeds(), locks, strict=True
                )
            ]
            with _Recorders(recorders, parts.session, stop) as recorder:
                recorder.resume(parts.ring)
                keys = functools.partial(seeds_lib.stream_keys, run_seeds)
                _explore(
                    config,
                    parts,
                    recorder,
                    calibrate=seeds_lib.over_seeds(
                        lambda key: loop.make_calibrate(parts.agent, parts.ring, key),
                        keys(loop.Stream.CALIBRATE),
                    ),
                    visit=seeds_lib.over_seeds(
                        lambda key: snapshots.make_visit(parts.agent, parts.ring, key),
                        keys(loop.Stream.SNAPSHOT),
                        in_axes=(0, 0, None),
                    ),
                    progress=progress,
                )
                for (workdir, one), session, written in zip(
                    left.items(), parts.session.of_seeds(), recorders, strict=True
                ):
                    results[workdir] = _pretrain_result(one, session, written, started)
            for workdir in left:
                _write_result(workdir, results[workdir], warn, stop)
    return list(results.values())


def _explore(
    config: config_lib.Config,
    parts: loop.Pretraining,
    recorder: "_Recorder | _Recorders",
    *,
    calibrate: Callable[[types.Params, replay.ReplayState], types.Params],
    visit: snapshots.Visit,
    progress: progress_lib.Progress | None,
) -> None:
    """Pretrains from where the session stands to the end, of one seed or of many."""
    session, schedule, num_envs = (
        parts.session,
        parts.schedule,
        parts.session.num_envs,
    )
    total = -(-config.pretrain.pretrain_agent_steps // num_envs)
    recorder.wait_for_refill(schedule, total)
    if progress is not None:
        frames = num_envs * FRAME_SKIP * recorder.num_seeds
        progress.start(PRETRAIN, total=total * frames, done=session.iteration * frames)
    while session.iteration < total:
        session.step(parts.act, parts.learn, schedule)
        is_last = session.iteration == total
        if session.agent_steps >= schedule.start and (
            is_last or recorder.is_row_due(config.report)
        ):
            params = calibrate(session.state.params, session.memory.replay)
            steps = devices.put(np.int32(session.agent_steps), session.mesh)
            recorder.write_snapshot(
                jax.device_get(visit(params, session.memory.replay, steps))
            )
            if is_last:  # Learning has ended: for good.
                session.state = session.state._replace(params=params)
        recorder.record(config.report, is_last=is_last, progress=progress)


def _pretrain_result(
    config: config_lib.Config,
    session: loop.Session,
    recorder: "_Recorder",
    started: float,
) -> dict[str, Any]:
    return {
        **_describe(config, PRETRAIN),
        "pretrain_frames": session.agent_steps * FRAME_SKIP,
        "updates": int(jax.device_get(session.state.num_updates)),
        "last_metrics": recorder.last_row,
        **_rate(session.agent_steps, started),
    }


def finetune(
    config: config_lib.Config,
    workdir: pathlib.Path,
    init: pathlib.Path | None,
    *,
    constructor: loop.MakePool = envs.AtariPool,
    progress: progress_lib.Progress | None = None,
    stop: interrupts.StopRequests | None = None,
) -> dict[str, Any]:
    """Infers the task from rewards, adapts at once, then learns from the reward.

    The agent plays under random tasks, `w` is found by linear regression of the
    rewards on the features of the states reached, and TD learning goes on with `w` and
    the features fixed (APS, Sec. 4.4, https://arxiv.org/abs/2108.13956). The same call
    continues a run that was interrupted.

    Args:
      config: The run's values.
      workdir: Folder of this stage; made if it does not exist.
      init: Folder of a pretraining whose agent is taken over whole; None starts from
        an untrained agent with the same budget.
      constructor: Makes the environments, as `envs.AtariPool`.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What `result.json` holds.

    Raises:
      ValueError: The folder holds another run, or `init` does not fit.
      loop.NonFinite: A loss or reward is not finite; nothing is saved after it but the
        batch that it was computed from.
      loop.EnvironmentFailure: The environments raised; a checkpoint was saved.
      interrupts.Interrupted: A stop was requested; a checkpoint was saved.
    """
    started = time.monotonic()
    constructor = game_tasks.constructor_for(config.finetune.task, constructor)
    mesh = devices.make_mesh(config.num_devices)
    resources.check_memory(config, is_pretraining=False)
    warn = _warning(progress)
    resources.check_cores(config, warn)
    values, learner = config.finetune, config.learner
    num_envs = values.finetune_num_envs
    with contextlib.ExitStack() as held:
        pool = loop.make_pool(
            config, num_envs, loop.Stream.FINETUNE_ACT, constructor, mesh
        )
        held.callback(pool.close)
        agent = agent_lib.make_agent(learner, values, num_actions=pool.num_actions)
        pretrain_frames = 0
        if init is None:
            state = loop.init_state(agent, config.seed, mesh)
        else:
            trained = load_pretrained(init)
            check_fits(trained, init, config, pool.num_actions)
            state = trained.state
            pretrain_frames = trained.facts["agent_steps"] * FRAME_SKIP
        result = _open(
            workdir,
            stage=FINETUNE,
            config=config,
            num_actions=pool.num_actions,
            init=None if init is None else str(init),
        )
        if result is not None:
            return result
        lock = held.enter_context(rundir.RunLock(workdir)) if hosts.is_first() else None
        ring = replay.make_replay(
            num_envs=num_envs,
            # Rounded up, so that nothing is overwritten.
            size=-(-values.finetune_agent_steps // num_envs) * num_envs,
            feature_dim=learner.feature_dim,
        )
        session = loop.Session(
            pool=pool,
            state=devices.put(jax.jit(agent.init_finetune)(state), mesh),
            memory=loop.init_memory(
                agent,
                ring,
                num_envs=num_envs,
                feature_dim=learner.feature_dim,
                mesh=mesh,
            ),
            sums=devices.put(metrics.init_sums(loop.names_of(metrics.LEARNING)), mesh),
            mesh=mesh,
        )
        with _Recorder(
            workdir, metrics.FINETUNE_COLUMNS, session, config, lock, warn, stop
        ) as recorder:
            facts = recorder.resume(ring)
            inferred = (
                Inferred.from_facts(facts["inferred"])
                if facts.get("inferred")
                else _infer(config, agent, ring, session, recorder, progress)
            )
            recorder.facts["inferred"] = inferred.to_facts()
            if progress is not None:
                progress.say(inferred.text())
            played, evaluations = _learn_task(
                config,
                agent,
                ring,
                session,
                recorder,
                inferred,
                is_pretrained=init is not None,
                constructor=constructor,
                progress=progress,
                stop=stop,
            )
        result = {
            **_describe(config, FINETUNE),
            "pretrain_frames": pretrain_frames,
            "finetune_agent_steps": session.agent_steps,
            "init": None if init is None else str(init),
            **_score(config, played),
            "evaluations": evaluations,
            "task": {"name": values.task, **inferred.to_facts()},
            "updates": int(jax.device_get(session.state.num_updates)),
            **_rate(session.agent_steps, started),
        }
        _write_result(workdir, result, warn, stop)
    return result


def _open(workdir: pathlib.Path, **facts: Any) -> dict[str, Any] | None:
    """Makes a folder this run's own, or finds it so; returns its result if there is one.

    Raises:
      ValueError: As `rundir.open_run`; or not all processes see the folder.
    """
    result = hosts.by_first(
        lambda: (
            rundir.find_result(workdir) if rundir.open_run(workdir, **facts) else None
        )
    )
    if result is None:
        hosts.check_shared(workdir)
    return result


@dataclasses.dataclass(frozen=True)
class Inferred:
    """An inferred task as plain values; float32 survives JSON bit for bit."""

    task: list[float]
    scale: float
    intercept: float
    r_squared: float
    num_samples: int
    num_nonzero: int
    is_fallback: bool
    agent_steps: int  # after which it was inferred

    def to_facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Inferred":
        return cls(**facts)

    def text(self) -> str:
        seen = f"{self.num_samples:,} rewards, {self.num_nonzero:,} of them not 0"
        if self.is_fallback:
            return f"No task could be inferred from {seen}: a random task is used."
        return (
            f"Task inferred from {seen}: R^2 {self.r_squared:.3f}, norm of w "
            f"{self.scale:.3g}."
        )


def _infer(
    config: config_lib.Config,
    agent: agent_lib.Agent,
    ring: replay.Replay,
    session: loop.Session,
    recorder: "_Recorder",
    progress: progress_lib.Progress | None,
) -> Inferred:
    """Plays under random tasks until the budget or the games are used up; regresses."""
    values = config.finetune
    act = loop.make_act(
        agent,
        ring,
        loop.stream_key(config.seed, loop.Stream.INFER_ACT),
        epsilon=config.pretrain.pretrain_epsilon,
        explore=True,
        regress_clip=values.reward_clip,
        mesh=session.mesh,
    )
    total = -(-values.infer_agent_steps // session.num_envs)
    if progress is not None:
        progress.start(
            "infer",
            total=total * session.num_envs * FRAME_SKIP,
            done=session.agent_steps * FRAME_SKIP,
        )
    num_games = recorder.facts.get("infer_games", 0)
    while session.iteration < total and num_games < values.infer_episodes:
        session.step(act)
        num_games += session.num_finished
        recorder.facts["infer_games"] = num_games
        recorder.record(config.report, is_last=False, progress=progress)

    return infer_from(config, session.memory.regression, session.agent_steps)


def infer_from(
    config: config_lib.Config, moments: tasks.RegressionMoments, agent_steps: int
) -> Inferred:
    """Infers a task from the moments of rewards and features, after `agent_steps`."""
    values = config.finetune
    fallback_key = loop.stream_key(config.seed, loop.Stream.FALLBACK_TASK)
    found = jax.device_get(
        tasks.infer_task(
            jax.device_get(moments),  # Each process infers the same by itself.
            fallback_task=jax.random.normal(
                fallback_key, (config.learner.feature_dim,)
            ),
            ridge=values.ridge,
        )
    )
    return Inferred(
        task=[float(value) for value in found.task],
        scale=float(found.scale),
        intercept=float(found.intercept),
        r_squared=float(found.r_squared),
        num_samples=int(found.num_samples),
        num_nonzero=int(found.num_nonzero),
        is_fallback=bool(found.is_fallback),
        agent_steps=agent_steps,
    )


def _learn_task(
    config: config_lib.Config,
    agent: agent_lib.Agent,
    ring: replay.Replay,
    session: loop.Session,
    recorder: "_Recorder",
    inferred: Inferred,
    *,
    is_pretrained: bool,
    constructor: loop.MakePool,
    progress: progress_lib.Progress | None,
    stop: interrupts.StopRequests | None,
) -> tuple[evaluation.Evaluation, list[dict[str, Any]]]:
    """Learns the inferred task and evaluates on the way.

    Returns:
      The last evaluation, and a summary of each.
    """
    values = config.finetune
    num_envs = session.num_envs
    task = np.asarray(inferred.task, np.float32)
    # An untrained psi is in no unit, so the scratch arm learns in the reward's own.
    scale = inferred.scale if is_pretrained else config.learner.value_unit
    act = loop.make_act(
        agent,
        ring,
        loop.stream_key(config.seed, loop.Stream.FINETUNE_ACT),
        epsilon=values.finetune_epsilon,
        explore=False,
        mesh=session.mesh,
    )
    session.sample = loop.make_sample(
        ring,
        config.learner,
        loop.stream_key(config.seed, loop.Stream.FINETUNE_LEARN),
        with_particles=False,
        mesh=session.mesh,
    )
    learn = loop.make_finetune_learn(
        agent,
        session.sample,
        task=task,
        reward_scale=np.float32(scale),
        mesh=session.mesh,
    )
    schedule = loop.Schedule(
        start=max(inferred.agent_steps, config.learner.window_length * num_envs),
        samples_per_step=values.finetune_samples_per_step,
        batch_size=config.learner.batch_size,
    )
    if session.agent_steps == inferred.agent_steps:  # Else it is pinned already.
        session.memory = loop.pin_task(session.memory, task, session.mesh)
    first = -(-inferred.agent_steps // num_envs)
    total = -(-values.finetune_agent_steps // num_envs)
    recorder.wait_for_refill(schedule, total)
    points = _evaluation_points(config.evaluation, first, total, num_envs)
    evaluations: list[dict[str, Any]] = recorder.facts.setdefault("evaluations", [])
    played: evaluation.Evaluation | None = None

    def evaluate_if_due() -> None:
        nonlocal played
        is_done = any(e["agent_steps"] == session.agent_steps for e in evaluations)
        if session.iteration not in points or is_done:
            return
        params = devices.local(session.state.params)

        def play() -> dict[str, list[float]]:
            return evaluation.evaluate(  # On one device, of the first process.
                config,
                agent,
                params,
                jnp.asarray(task),
                # psi of other tasks is as good as that of w before learning, not after.
                use_gpi=session.iteration == first,
                constructor=constructor,
                progress=progress,
                stop=stop,
            ).to_lists()

        played = evaluation.from_lists(hosts.by_first(play))
        summary = evaluation.summary(config, played)
        evaluations.append(
            {"agent_steps": session.agent_steps, **loop.without_nan(summary)}
        )
        recorder.write({**session.row(), **summary})
        if progress is not None:
            progress.start(
                FINETUNE,
                total=total * num_envs * FRAME_SKIP,
                done=session.agent_steps * FRAME_SKIP,
            )

    evaluate_if_due()
    while session.iteration < total:
        session.step(act, learn, schedule)
        is_last = session.iteration == total
        if is_last:
            recorder.save()
        else:
            recorder.record(config.report, is_last=False, progress=progress)
        evaluate_if_due()
    return played, evaluations


def _evaluation_points(
    values: config_lib.EvaluationConfig, first: int, total: int, num_envs: int
) -> list[int]:
    """Returns the iterations after which a fine-tuning is evaluated.

    The last is always among them. Steps that were set come after zero-shot (`first`),
    rounded up to whole iterations; else the points are evenly spaced from there on, and
    one evaluation means the last alone.
    """
    if set_steps := values.set_agent_steps:
        points = {-(-steps // num_envs) for steps in set_steps} | {first, total}
        return sorted(point for point in points if first <= point <= total)
    count = values.evaluations
    points = [first + (total - first) * i // max(count - 1, 1) for i in range(count)]
    return points if count > 1 else [total]


_RETRY_SECONDS = 10.0  # between tries to write what a finished stage must leave


class _Recorder:
    """Writes a stage's rows and checkpoints, and takes the stage up from the last.

    A disk that cannot be written is no reason to end a stage that runs: it is warned of
    and tried again with every row.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        columns: tuple[str, ...],
        session: loop.Session,
        config: config_lib.Config,
        lock: rundir.RunLock | None,
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
        self._origin = {
            "config": config_lib.to_dict(config),
            "versions": rundir.versions(),
            "git_commit": rundir.git_commit(),
        }
        self._checkpointer = checkpoint.Checkpointer(
            workdir / rundir.CHECKPOINTS_NAME,
            policy=checkpoint.Policy(
                keep_last=report.keep_checkpoints,
                keep_every=-(-report.keep_every_frames // FRAME_SKIP),
                keep_best=report.keep_best,
            ),
            warn=warn,
        )
        self._saved: int | None = None  # number of the newest checkpoint
        self._is_behind = False  # whether one that was due is not on disk
        self._vote = devices.Vote(session.mesh)
        self._writer: metrics.MetricsWriter | None = None  # of the first process
        self.facts: dict[str, Any] = {}
        self.last_row: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace
    ) -> None:
        if not (error is None or isinstance(error, _AGREED)) and hosts.is_connected():
            # The others are elsewhere: what needs them all would never come to an end.
            if isinstance(error, loop.EnvironmentFailure):
                error.args = (f"{error}. {self._last_words()}",)
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
        parts, ring = self._parts(), self._session.memory.replay
        resources.check_disk(
            self._workdir,
            fixed_bytes=num_seeds
            * (_num_bytes(parts["agent"]) + _num_bytes(parts["loop"])),
            replay_bytes=num_seeds * _num_bytes(ring) if self._has_replay else 0,
            kept=self._origin["config"]["report"]["keep_checkpoints"],
            warn=self._warn,
        )

    def resume(self, ring: replay.Replay) -> dict[str, Any]:
        """Takes the session to the newest checkpoint, if there is one.

        Args:
          ring: Makes the replay, where the checkpoint has none.

        Returns:
          The facts of that checkpoint; empty for a new run.

        Raises:
          ValueError: The folder cannot be written, has not room for a checkpoint, or
            holds one of another agent.
        """
        hosts.set_last_words(self._last_words)
        hosts.by_first(self.check_disk)
        return self.go_on(ring)

    def go_on(self, ring: replay.Replay) -> dict[str, Any]:
        """Does what `resume` does, in a folder with room enough."""
        session = self._session
        parts = self._parts()
        templates = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            {**parts, "replay": session.memory.replay},
        )
        if hosts.by_first(self.numbers):
            # Not both at once: the one on disk needs the place.
            session.forget_replay()
        del parts
        found = self._checkpointer.restore_newest(
            templates, optional=("replay",), set_damaged_aside=True
        )
        if found is not None:
            self._take_up(*found, ring)
        if hosts.is_first():
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
        return self._checkpointer.numbers()

    def go_back(self, number: int) -> None:
        """Deletes what is newer than a checkpoint that the run goes back to."""
        newer = [there for there in self.numbers() if there > number]
        if newer:
            self._warn(
                f"goes back to agent step {number:,}, where all seeds have a checkpoint; "
                f"that of {newer[-1]:,} is deleted."
            )
            self._checkpointer.delete(newer)

    def is_row_due(self, values: config_lib.ReportConfig) -> bool:
        """Returns whether a row of metrics belongs to the last step."""
        session = self._session
        return loop.is_due(
            values.report_agent_steps, session.agent_steps, session.num_envs
        )

    def _parts(self) -> dict[str, Any]:
        session = self._session
        memory = session.memory
        return {
            "agent": session.state,
            "loop": (memory.actor, memory.episodes, memory.regression, session.sums),
        }

    def _take_up(
        self, facts: dict[str, Any], parts: dict[str, Any], ring: replay.Replay
    ) -> None:
        session = self._session
        self.facts = facts
        session.state = parts["agent"]
        actor, episodes, regression, session.sums = parts["loop"]
        session.iteration = facts["agent_steps"] // session.num_envs
        self._saved = session.agent_steps
        self.last_row = facts["last_row"]
        if "replay" not in parts:
            parts["replay"] = loop.init_replay(ring, session.mesh)
            facts["replay_since"] = session.agent_steps
        session.memory = loop.Memory(actor, parts["replay"], episodes, regression)
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
        progress: progress_lib.Progress | None,
    ) -> None:
        """Writes a row and a checkpoint where they are due, and shows progress.

        Raises:
          interrupts.Interrupted: A stop was requested.
        """
        self.write_due(values, is_last=is_last)
        if progress is not None:
            frames = self._session.agent_steps * FRAME_SKIP
            progress.tick(frames, self.last_row.get("episode_return"))
        if self._stop is not None and not is_last:
            self._check_stop(self._stop)

    def write_due(self, values: config_lib.ReportConfig, *, is_last: bool) -> None:
        """Writes a row and a checkpoint where they are due."""
        steps, num_envs = self._session.agent_steps, self._session.num_envs
        is_row = self.is_row_due(values) or is_last
        if is_row:
            self.write(self._session.row())
            self._is_behind = hosts.by_first(lambda: self._is_behind)
        failure = self._checkpointer.failure()
        if failure is not None:
            self._complain(failure)
        is_save = loop.is_due(values.checkpoint_agent_steps, steps, num_envs) or is_last
        if is_save or (is_row and self._is_behind):
            self.save()

    def write_snapshot(self, visited: np.ndarray) -> None:
        """Writes where the features are, or warns: pictures are no reason to end."""
        if not hosts.is_first():
            return
        steps = self._session.agent_steps
        try:
            snapshots.write_snapshot(self._workdir, steps, visited)
        except OSError as error:
            self._warn(f"no feature snapshot at agent step {steps:,}: {error}.")

    def _check_stop(self, stop: interrupts.StopRequests) -> None:
        if not self._vote.is_needed:
            stop.check()
        elif self._vote.ask(stop.is_requested()):
            stop.obey()

    def _complain(self, error: Exception) -> None:
        """Warns that something could not be written."""
        self._is_behind = True
        numbers = self._checkpointer.numbers()
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
        if hosts.is_first():
            try:
                self._ensure_folder()
                self._writer.write(row)
            except (OSError, ValueError) as error:
                self._complain(error)
        if is_evaluation and self._config.report.keep_best:
            self._saved = None  # One of this step may lack the score.
            self.save()

    def _ensure_folder(self) -> None:
        """Makes the folder anew if somebody deleted it."""
        if self._lock.ensure():
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
            parts["replay"] = session.memory.replay
        self._is_behind = False
        if not hosts.by_first(self._sync):
            return
        try:
            self._checkpointer.save(
                session.agent_steps, parts, {**self.facts, **self._origin}
            )
            self._saved = session.agent_steps
        except (OSError, ValueError) as error:
            self._complain(error)

    def _sync(self) -> bool:
        """Brings to disk the rows, which a checkpoint counts; returns whether it could."""
        try:
            self._ensure_folder()
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
        self._is_behind = hosts.by_first(lambda: self._is_behind)
        self.save()
        failure = hosts.by_first(self._finish)
        if failure is not None:
            self._is_behind = True
            raise OSError(failure)

    def _finish(self) -> str | None:
        """Waits for the checkpoint under way; returns why it is not on disk."""
        try:
            self._checkpointer.finish()
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
        where = hosts.by_first(lambda: self._write_batch(error.batch))
        error.args = (f"{error} {where}",)

    def _write_batch(self, batch: dict[str, np.ndarray]) -> str:
        """Writes a batch; says where it is, and which checkpoint is the last."""
        path = self._workdir / f"nonfinite_{self._session.agent_steps}.npz"
        with contextlib.suppress(OSError):  # Was warned of, or is in what is said.
            self._checkpointer.finish()
        try:
            np.savez_compressed(path, **batch)
            where = f"The batch is in {path}."
        except OSError as failure:
            where = f"The batch could not be written ({failure})."
        numbers = self._checkpointer.numbers()
        last = f"is of agent step {numbers[-1]:,}" if numbers else "does not exist"
        return f"{where} The last good checkpoint {last}."

    def _last_words(self) -> str:
        """Says how a run goes on whose other processes are lost."""
        numbers = self._checkpointer.numbers()
        last = f"is of agent step {numbers[-1]:,}" if numbers else "does not exist yet"
        return f"The last checkpoint {last}; the same commands on all hosts continue the run"


# Errors that all processes raise at the same step.
_AGREED = (interrupts.Interrupted, loop.NonFinite)


class _Recorders:
    """Records the many seeds of one session, each in its own folder."""

    def __init__(
        self,
        recorders: Sequence[_Recorder],
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

    def resume(self, ring: replay.Replay) -> None:
        """Takes all seeds to the newest checkpoint that each of them has.

        Args:
          ring: Makes a seed's replay, where checkpoints have none.

        Raises:
          ValueError: As `_Recorder.resume`; or the seeds stand further apart than a
            process that dies can leave them; or checkpoints are damaged, or differ in
            whether they hold the replay.
        """
        self._recorders[0].check_disk(self.num_seeds)
        self._meet()
        for recorder in self._recorders:
            recorder.go_on(ring)
        # What each checkpoint is of, and since when its replay has been filled.
        found = [
            (r.facts.get("agent_steps", 0), r.facts.get("replay_since", 0))
            for r in self._recorders
        ]
        if len(set(found)) > 1:
            steps = ", ".join(f"{at:,}" for at, _ in found)
            raise ValueError(
                f"The seeds {self._names()} have no common checkpoint that is whole and "
                f"of one kind (they are of agent steps {steps}): the same command tries "
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
                f"The seeds {self._names()} stand at agent steps {steps}, too far apart "
                "to go on together: continue them one after another with --seeds."
            )
        for recorder in self._recorders:
            recorder.go_back(common)

    def _names(self) -> str:
        return ", ".join(map(str, self._session.seeds))

    def wait_for_refill(self, schedule: loop.Schedule, total: int) -> None:
        """Puts learning off as `_Recorder.wait_for_refill`, for all seeds alike."""
        self._recorders[0].wait_for_refill(schedule, total)

    def is_row_due(self, values: config_lib.ReportConfig) -> bool:
        """Returns whether a row of metrics belongs to the last step."""
        return self._recorders[0].is_row_due(values)

    def write_snapshot(self, visited: np.ndarray) -> None:
        """Writes where the features of each seed are."""
        for recorder, of_seed in zip(self._recorders, visited, strict=True):
            recorder.write_snapshot(of_seed)

    def record(
        self,
        values: config_lib.ReportConfig,
        *,
        is_last: bool,
        progress: progress_lib.Progress | None,
    ) -> None:
        """Writes rows and checkpoints where they are due, and shows progress.

        Raises:
          interrupts.Interrupted: A stop was requested.
          loop.NonFinite: A seed is not finite; the others have their rows.
        """
        bad: loop.NonFinite | None = None
        for recorder in self._recorders:
            try:
                recorder.write_due(values, is_last=is_last)
            except loop.NonFinite as error:
                bad = bad or error
        if bad is not None:
            raise bad
        if progress is not None:
            known = [
                value
                for recorder in self._recorders
                if (value := recorder.last_row.get("episode_return")) is not None
            ]
            progress.tick(
                self._session.agent_steps * FRAME_SKIP * self.num_seeds,
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


def _warn_of_seed(warn: Callable[[str], None], seed: int, text: str) -> None:
    warn(f"seed {seed}: {text}")


def _num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _warning(progress: progress_lib.Progress | None) -> Callable[[str], None]:
    """Returns where warnings go: to those who watch, else to the log."""
    if progress is None:
        return logging.warning
    return lambda text: progress.say(f"warning: {text}")


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
        ends = time.monotonic() + _RETRY_SECONDS
        while time.monotonic() < ends:
            if stop is not None:
                stop.check()
            time.sleep(0.2)


def _write_result(
    workdir: pathlib.Path,
    result: dict[str, Any],
    warn: Callable[[str], None],
    stop: interrupts.StopRequests | None,
) -> None:
    path = workdir / rundir.RESULT_NAME
    hosts.by_first(
        lambda: _patiently(lambda: rundir.write_json(path, result), warn, stop)
    )


def load_pretrained(workdir: pathlib.Path) -> Trained:
    """Loads the newest agent of a pretraining.

    Args:
      workdir: Folder of a pretraining, or of a run that began with one.

    Raises:
      ValueError: There is none, or its checkpoint does not fit its own config.
    """
    return _load(rundir.find_stage(workdir, PRETRAIN), is_finetuned=False)


def load_finetuned(workdir: pathlib.Path) -> Trained:
    """Loads the newest agent of a fine-tuning, whose facts hold the inferred task.

    Raises:
      ValueError: There is none, or its checkpoint does not fit its own config.
    """
    trained = _load(rundir.find_stage(workdir, FINETUNE), is_finetuned=True)
    if not trained.facts.get("inferred"):
        raise ValueError(f"The run in {workdir} has not inferred a task yet.")
    return trained


def _load(folder: pathlib.Path, *, is_finetuned: bool) -> Trained:
    facts, config = rundir.read_run(folder)
    num_actions = facts["num_actions"]
    checkpointer = checkpoint.Checkpointer(folder / rundir.CHECKPOINTS_NAME)
    try:
        agent = agent_lib.make_agent(
            config.learner, config.finetune, num_actions=num_actions
        )

        def init(key):
            state = agent.init(key)
            return agent.init_finetune(state) if is_finetuned else state

        template = jax.eval_shape(init, jax.random.key(0))
        found = checkpointer.restore_newest({"agent": template})
        if found is None:
            raise ValueError(f"The run in {folder} has no checkpoint yet.")
        facts, parts = found
        return Trained(config, agent, parts["agent"], num_actions, facts)
    finally:
        checkpointer.close()


# What a pretrained agent must share with the run that takes it over.
_SHARED = ("encoder", "hidden_units", "feature_dim", "td_form", "unit_values")


def check_fits(
    trained: Trained,
    folder: pathlib.Path,
    config: config_lib.Config,
    num_actions: int,
) -> None:
    """Checks that a run can take over a pretrained agent.

    Raises:
      ValueError: Game, actions or network differ; the message shows both sides.
    """
    there = {"game": trained.config.game, "num_actions": trained.num_actions}
    here = {"game": config.game, "num_actions": num_actions}
    for name in _SHARED:
        there[name] = getattr(trained.config.learner, name)
        here[name] = getattr(config.learner, name)
    differences = [
        f"{name} is {there[name]!r} there and {here[name]!r} here"
        for name in there
        if there[name] != here[name]
    ]
    if differences:
        raise ValueError(
            f"The agent in {folder} does not fit this run: {'; '.join(differences)}."
        )


def _describe(config: config_lib.Config, stage: str) -> dict[str, Any]:
    return {
        "schema": rundir.SCHEMA,
        "stage": stage,
        "game": config.game,
        "agent": config.agent,
        "seed": config.seed,
        "preset": config.preset,
    }


def evaluation_result(
    config: config_lib.Config,
    played: evaluation.Evaluation,
    *,
    checkpoint: str,
    started: float,
) -> dict[str, Any]:
    """Returns what `result.json` holds of an evaluation alone.

    Args:
      config: The run's values, the protocol among them.
      played: The full games.
      checkpoint: Whose agent played.
      started: `time.monotonic()` at the beginning.
    """
    seconds = time.monotonic() - started
    return {
        **_describe(config, "evaluate"),
        "checkpoint": checkpoint,
        "task": config.finetune.task,
        **_score(config, played),
        "wall_seconds": round(seconds, 3),
        "device": jax.devices()[0].platform,
        "git_commit": rundir.git_commit(),
    }


def _score(config: config_lib.Config, played: evaluation.Evaluation) -> dict[str, Any]:
    summary = loop.without_nan(evaluation.summary(config, played))
    return {
        "returns": [float(value) for value in played.returns],
        "score_returns": [float(value) for value in played.score_returns],
        "lengths": [int(value) for value in played.lengths],
        "return_mean": summary["eval_return_mean"],
        "human_normalized_score": summary["eval_human_normalized"],
        "protocol": evaluation.protocol_of(config),
    }


def _rate(agent_steps: int, started: float) -> dict[str, Any]:
    seconds = time.monotonic() - started
    return {
        "wall_seconds": round(seconds, 3),
        "frames_per_second": round(agent_steps * FRAME_SKIP / seconds, 1),
        "device": jax.devices()[0].platform,
        "git_commit": rundir.git_commit(),
    }
