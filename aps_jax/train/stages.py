"""The stages of a run: pretraining without reward, and fine-tuning with it."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import aps as agent_lib
from aps_jax.config import FRAME_SKIP
from aps_jax.envs import atari, reward_functions
from aps_jax.ops import tasks
from aps_jax.parallel import devices, interrupts, processes
from aps_jax.replay import buffer
from aps_jax.runs import checkpoints, folders, machine, metrics
from aps_jax.runs import progress as progress_lib
from aps_jax.train import evaluation, loop, recorders, snapshots
from aps_jax.train import seeds as seeds_lib

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
    constructor: loop.MakePool = atari.AtariPool,
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
    machine.check_memory(config, is_pretraining=True)
    warn = _warning(progress)
    machine.check_cores(config, warn)
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
        lock = (
            held.enter_context(folders.RunLock(workdir))
            if processes.is_primary()
            else None
        )
        parts = loop.make_pretraining(config, pool, mesh)
        agent, ring, session = parts.agent, parts.ring, parts.session
        with recorders.Recorder(
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
        recorders.write_result(workdir, result, warn, stop)
    return result


def pretrain_seeds(
    configs: Mapping[pathlib.Path, config_lib.Config],
    *,
    constructor: loop.MakePool = atari.AtariPool,
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
    machine.check_memory(config, is_pretraining=True, num_seeds=len(configs))
    warn = _warning(progress)
    machine.check_cores(config, warn)
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
        if not left:
            return list(results.values())
        run_seeds = [one.seed for one in left.values()]
        if len(left) < len(configs):
            held.close()  # These environments are too many.
            pool = make_pool(run_seeds)
        locks = [held.enter_context(folders.RunLock(workdir)) for workdir in left]
        parts = seeds_lib.make_pretraining(config, run_seeds, pool)
        written = [
            recorders.Recorder(
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
        with recorders.SeedsRecorder(written, parts.session, stop) as recorder:
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
            for (workdir, one), session, of_seed in zip(
                left.items(), parts.session.of_seeds(), written, strict=True
            ):
                results[workdir] = _pretrain_result(one, session, of_seed, started)
        for workdir in left:
            recorders.write_result(workdir, results[workdir], warn, stop)
    return list(results.values())


def _explore(
    config: config_lib.Config,
    parts: loop.Pretraining,
    recorder: recorders.Recorder | recorders.SeedsRecorder,
    *,
    calibrate: Callable[[types.Params, buffer.ReplayState], types.Params],
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
    recorder: recorders.Recorder,
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
    constructor: loop.MakePool = atari.AtariPool,
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
    constructor = reward_functions.constructor_for(config.finetune.task, constructor)
    mesh = devices.make_mesh(config.num_devices)
    machine.check_memory(config, is_pretraining=False)
    warn = _warning(progress)
    machine.check_cores(config, warn)
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
        lock = (
            held.enter_context(folders.RunLock(workdir))
            if processes.is_primary()
            else None
        )
        ring = buffer.make_replay(
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
        with recorders.Recorder(
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
        recorders.write_result(workdir, result, warn, stop)
    return result


def _open(workdir: pathlib.Path, **facts: Any) -> dict[str, Any] | None:
    """Makes a folder this run's own, or finds it so; returns its result if there is one.

    Raises:
      ValueError: As `rundir.open_run`; or not all processes see the folder.
    """
    result = processes.broadcast_from_primary(
        lambda: (
            folders.find_result(workdir) if folders.open_run(workdir, **facts) else None
        )
    )
    if result is None:
        processes.check_shared(workdir)
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
    ring: buffer.Replay,
    session: loop.Session,
    recorder: recorders.Recorder,
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
    ring: buffer.Replay,
    session: loop.Session,
    recorder: recorders.Recorder,
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

        played = evaluation.from_lists(processes.broadcast_from_primary(play))
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


def _warn_of_seed(warn: Callable[[str], None], seed: int, text: str) -> None:
    warn(f"seed {seed}: {text}")


def _warning(progress: progress_lib.Progress | None) -> Callable[[str], None]:
    """Returns where warnings go: to those who watch, else to the log."""
    if progress is None:
        return logging.warning
    return lambda text: progress.say(f"warning: {text}")


def load_pretrained(workdir: pathlib.Path) -> Trained:
    """Loads the newest agent of a pretraining.

    Args:
      workdir: Folder of a pretraining, or of a run that began with one.

    Raises:
      ValueError: There is none, or its checkpoint does not fit its own config.
    """
    return _load(folders.find_stage(workdir, PRETRAIN), is_finetuned=False)


def load_finetuned(workdir: pathlib.Path) -> Trained:
    """Loads the newest agent of a fine-tuning, whose facts hold the inferred task.

    Raises:
      ValueError: There is none, or its checkpoint does not fit its own config.
    """
    trained = _load(folders.find_stage(workdir, FINETUNE), is_finetuned=True)
    if not trained.facts.get("inferred"):
        raise ValueError(f"The run in {workdir} has not inferred a task yet.")
    return trained


def _load(folder: pathlib.Path, *, is_finetuned: bool) -> Trained:
    facts, config = folders.read_run(folder)
    num_actions = facts["num_actions"]
    checkpointer = checkpoints.Checkpointer(folder / folders.CHECKPOINTS_NAME)
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
        "schema": folders.SCHEMA,
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
        "git_commit": folders.git_commit(),
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
        "git_commit": folders.git_commit(),
    }
