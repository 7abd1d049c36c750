"""The stages of a run: pretraining without reward, and fine-tuning with it.

They know no agent: see `agents.base`.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import base
from aps_jax.envs import atari, reward_functions
from aps_jax.parallel import devices, interrupts, processes
from aps_jax.replay import buffer
from aps_jax.runs import checkpoints, folders, machine, metrics
from aps_jax.runs import progress as progress_lib
from aps_jax.train import evaluation, loop, recorders
from aps_jax.train import seeds as seeds_lib
from aps_jax.types import FRAME_SKIP

PRETRAIN = "pretrain"
FINETUNE = "finetune"


class Trained(NamedTuple):
    """An agent restored from a run's folder."""

    config: config_lib.Config
    agent: base.Agent
    state: base.AgentState
    num_actions: int
    facts: dict[str, Any]  # of the checkpoint
    step: int  # agent steps of the stage at the checkpoint


def pretrain(
    config: config_lib.Config,
    workdir: folders.PathLike,
    *,
    constructor: loop.MakePool = atari.AtariPool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> dict[str, Any]:
    """Pretrains an agent on a game whose reward it never sees.

    The same call continues a run that was interrupted. It returns at once if the run
    is finished.

    Args:
      config: The run's values.
      workdir: Folder of this stage; made if it does not exist.
      constructor: Makes the environments, as `atari.AtariPool`.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What `result.json` holds. The newest checkpoint holds the agent.

    Raises:
      ValueError: The folder holds another run, or the agent has no reward-free phase.
      loop.NonFinite: A loss or reward is not finite; nothing is saved after it but the
        batch that it was computed from.
      loop.EnvironmentFailure: The environments raised; a checkpoint was saved.
      interrupts.Interrupted: A stop was requested; a checkpoint was saved.
    """
    started = time.monotonic()
    workdir = folders.as_path(workdir)
    _check_has_pretraining(config)
    facts = {"stage": PRETRAIN, "config": config}
    result = _find_finished(workdir, **facts)
    if result is not None:
        return result
    mesh, warn = _check_machine(config, progress, is_pretraining=True)
    with contextlib.ExitStack() as held:
        pool = loop.make_pool(
            config,
            config.pretrain.num_envs,
            loop.Stream.PRETRAIN_ACT,
            constructor,
            mesh,
        )
        held.callback(pool.close)
        lock = _open(held, workdir, warn, **facts)
        agent = config.make_agent(pool.num_actions)
        plan = loop.pretrain_plan(config, agent)
        state = loop.init_state(agent, config.seed, mesh)
        session = loop.start(config, plan, pool, state, mesh=mesh)
        stream = functools.partial(loop.stream_key, config.seed)
        session.calibrate = jax.jit(
            loop.make_calibrate(agent, stream(loop.Stream.CALIBRATE), mesh),
            donate_argnums=0,
            out_shardings=devices.sharding(mesh),
        )
        embed = jax.jit(
            loop.make_embed(agent, stream(loop.Stream.EMBED), mesh),
            out_shardings=devices.sharding(mesh),
        )
        with recorders.Recorder(
            workdir,
            metrics.pretrain_columns(plan.phase.learner.metrics),
            session,
            config,
            lock,
            warn,
            stop,
        ) as recorder:
            recorder.resume()
            _explore(config, session, recorder, embed, progress)
            result = _pretrain_result(config, session, recorder, started)
        recorders.write_result(workdir, result, warn, stop)
    return result


def pretrain_seeds(
    configs: Mapping[pathlib.Path, config_lib.Config],
    *,
    constructor: loop.MakePool = atari.AtariPool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> list[dict[str, Any]]:
    """Pretrains several seeds at once, on one device and with one pool (`seeds`).

    Every folder is written as `pretrain` would write it, and can be continued or used
    by itself. Seeds that are finished are left as they are; the others go on from the
    newest checkpoint that all of them have.

    Args:
      configs: The runs' values by folder; they differ in the seed alone.
      constructor: Makes the environments, as `atari.AtariPool`.
      progress: Where to show progress, of all seeds together; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What each folder's `result.json` holds.

    Raises:
      ValueError: The configs differ in more than the seed or name several devices, a
        folder holds another run, or the seeds stand too far apart.
      loop.NonFinite: A loss or reward of one seed is not finite. Of that seed only the
        batch is saved; a checkpoint of every other was saved.
      loop.EnvironmentFailure: The environments raised; checkpoints were saved.
      interrupts.Interrupted: A stop was requested; checkpoints were saved.
    """
    started = time.monotonic()
    config = next(iter(configs.values()))
    seeds_lib.check_configs(list(configs.values()))
    _check_has_pretraining(config)
    results = {
        workdir: _find_finished(workdir, stage=PRETRAIN, config=one)
        for workdir, one in configs.items()
    }
    left = {w: one for w, one in configs.items() if results[w] is None}
    if not left:
        return [result for result in results.values() if result is not None]
    _, warn = _check_machine(
        config, progress, is_pretraining=True, num_seeds=len(configs)
    )
    run_seeds = [one.seed for one in left.values()]
    with contextlib.ExitStack() as held:
        pool = loop.make_pool(
            config,
            config.pretrain.num_envs,
            loop.Stream.PRETRAIN_ACT,
            constructor,
            run_seeds=run_seeds,
        )
        held.callback(pool.close)
        locks = [
            _open(held, workdir, warn, stage=PRETRAIN, config=one)
            for workdir, one in left.items()
        ]
        session, embed = seeds_lib.start_pretraining(config, run_seeds, pool)
        written = [
            recorders.Recorder(
                workdir,
                metrics.pretrain_columns(session.metrics),
                of_seed,
                one,
                lock,
                functools.partial(_warn_of_seed, warn, one.seed),
                stop,
            )
            for (workdir, one), of_seed, lock in zip(
                left.items(), session.of_seeds(), locks, strict=True
            )
        ]
        with recorders.SeedsRecorder(written, session, stop) as recorder:
            recorder.resume()
            _explore(config, session, recorder, embed, progress)
            for (workdir, one), of_seed, its_recorder in zip(
                left.items(), session.of_seeds(), written, strict=True
            ):
                results[workdir] = _pretrain_result(one, of_seed, its_recorder, started)
        for workdir in left:
            recorders.write_result(workdir, results[workdir] or {}, warn, stop)
    return [result for result in results.values() if result is not None]


def _check_has_pretraining(config: config_lib.Config) -> None:
    """Raises a `ValueError` unless the agent can be pretrained without reward."""
    if config.report.keep_best:
        raise ValueError(
            "keep_best ranks checkpoints by the score, which a reward-free stage "
            "must not see: leave it out here, and give it to fine-tuning."
        )
    loop.pretrain_plan(config, config.make_agent(num_actions=2))


def _check_machine(
    config: config_lib.Config,
    progress: progress_lib.Silent,
    **of_stage: Any,
) -> tuple[devices.Mesh, Callable[[str], None]]:
    """Checks devices, memory and cores; returns the mesh and where warnings go."""
    mesh = devices.make_mesh(config.num_devices)
    check_memory(config, **of_stage)
    warn = progress.warn
    machine.check_cores(config.environment.env_threads, warn)
    return mesh, warn


def _explore(
    config: config_lib.Config,
    session: loop.Session,
    recorder: recorders.Recorder | recorders.SeedsRecorder,
    embed: Callable[..., dict[str, jax.Array]],
    progress: progress_lib.Silent,
) -> None:
    """Pretrains from where the session stands to the end, one seed or many."""
    num_envs, schedule = session.num_envs, session.schedule
    assert schedule is not None
    total = -(-config.pretrain.pretrain_agent_steps // num_envs)
    recorder.wait_for_refill(schedule, total)
    frames = num_envs * FRAME_SKIP * recorder.num_seeds
    progress.start(PRETRAIN, total=total * frames, done=session.iteration * frames)
    while session.iteration < total:
        session.step()
        is_last = session.iteration == total
        if session.agent_steps >= schedule.start and (
            is_last or recorder.is_row_due(config.report)
        ):
            session.prepare_save()
            steps = devices.device_put(np.int32(session.agent_steps), session.mesh)
            visited = embed(session.state, session.rollout.replay, steps)
            recorder.write_snapshot(jax.device_get(visited))
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
    workdir: folders.PathLike,
    init: folders.PathLike | None,
    *,
    constructor: loop.MakePool = atari.AtariPool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> dict[str, Any]:
    """Shows the reward: the agent adapts at once, then learns from it.

    A pretrained agent first plays as it did while pretraining, and adapts to the
    rewards of that play; what it played stays in the replay. An untrained agent learns
    from its first steps. The same call continues a run that was interrupted.

    Args:
      config: The run's values.
      workdir: Folder of this stage; made if it does not exist.
      init: Folder of a pretraining whose agent is taken over whole; None starts from
        an untrained agent with the same budget.
      constructor: Makes the environments, as `atari.AtariPool`.
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
    workdir = folders.as_path(workdir)
    init = None if init is None else folders.as_path(init)
    constructor = reward_functions.constructor_for(config.finetune.task, constructor)
    trained = None
    if init is not None:
        _check_fits_config(init, config)
    facts = {
        "stage": FINETUNE,
        "config": config,
        "init": None if init is None else str(init),
    }
    result = _find_finished(workdir, **facts)
    if result is not None:
        return result
    mesh, warn = _check_machine(config, progress, is_pretraining=False)
    values = config.finetune
    with contextlib.ExitStack() as held:
        pool = loop.make_pool(
            config,
            values.finetune_num_envs,
            loop.Stream.FINETUNE_ACT,
            constructor,
            mesh,
        )
        held.callback(pool.close)
        agent = config.make_agent(pool.num_actions)
        if init is None:
            state = loop.init_state(agent, config.seed, mesh)
        else:
            trained = load_pretrained(init, warn=warn)
            check_fits(trained, init, config, pool.num_actions)
            state = trained.state
        lock = _open(held, workdir, warn, **facts)
        state = devices.device_put(jax.jit(agent.start_finetune)(state), mesh)
        plan = loop.finetune_plan(config, agent)
        session = loop.start(config, plan, pool, state, mesh=mesh)
        with recorders.Recorder(
            workdir,
            metrics.finetune_columns(plan.phase.learner.metrics),
            session,
            config,
            lock,
            warn,
            stop,
        ) as recorder:
            if not recorder.resume().get("adapted"):
                rollouts = None
                if trained is not None:
                    rollouts = roll_out(
                        config, agent, session, recorder=recorder, progress=progress
                    )
                session.state, adapted = adapt(config, agent, session, rollouts)
                recorder.facts["adapted"] = adapted
            adapted = recorder.facts["adapted"]
            progress.say(adapted["summary"])
            played, evaluations = _learn(
                config,
                agent,
                session,
                recorder,
                plan,
                constructor=constructor,
                progress=progress,
                stop=stop,
            )
        result = {
            **_describe(config, FINETUNE),
            "pretrain_frames": (0 if trained is None else trained.step * FRAME_SKIP),
            "init_agent_steps": None if trained is None else trained.step,
            "finetune_agent_steps": session.agent_steps,
            "init": None if init is None else str(init),
            **_score(config, played),
            "evaluations": evaluations,
            "task": {
                "name": values.task,
                **{name: x for name, x in adapted.items() if name != "summary"},
            },
            "updates": int(jax.device_get(session.state.num_updates)),
            **_rate(session.agent_steps, started),
        }
        recorders.write_result(workdir, result, warn, stop)
    return result


def _find_finished(workdir: pathlib.Path, **facts: Any) -> dict[str, Any] | None:
    """Returns the result of a finished run; asked before emulators start.

    Raises:
      ValueError: The folder holds another run.
    """

    def find() -> dict[str, Any] | None:
        if not (workdir / folders.CONFIG_NAME).exists():
            return None
        folders.open_run(workdir, **facts)
        return folders.find_result(workdir)

    return processes.broadcast_from_primary(find)


def _open(
    held: contextlib.ExitStack,
    workdir: folders.PathLike,
    warn: Callable[[str], None],
    **facts: Any,
) -> folders.RunLock | None:
    """Claims the run's folder, and locks it in the first process.

    Raises:
      ValueError: As `folders.open_run`; or not all processes see the folder.
    """
    processes.broadcast_from_primary(lambda: folders.open_run(workdir, **facts))
    processes.check_shared(pathlib.Path(workdir))
    if not processes.is_primary():
        return None
    return held.enter_context(folders.RunLock(workdir, warn=warn))


def roll_out(
    config: config_lib.Config,
    agent: base.Agent,
    session: loop.Session,
    *,
    recorder: recorders.Recorder | None = None,
    progress: progress_lib.Silent = progress_lib.SILENT,
    check: Callable[[], None] | None = None,
) -> base.Rollouts:
    """Plays as in pretraining until the budget is used up.

    A fixed number of steps: the first games to end would be the short ones.

    Args:
      config: The run's values; `config.finetune` has the budget.
      agent: The agent.
      session: Of fine-tuning; what is played stays in its replay.
      recorder: Writes rows and checkpoints meanwhile; none by default.
      progress: Where to show progress; nowhere by default.
      check: Called in every step; may raise.
    """
    values, mesh = config.finetune, session.mesh
    key = loop.stream_key(config.seed, loop.Stream.INFER_ACT)
    policy = loop.pretrain_plan(config, agent).phase.policy
    total = -(-values.infer_agent_steps // session.num_envs)
    frames = session.num_envs * FRAME_SKIP
    progress.start("infer", total=total * frames, done=session.iteration * frames)
    act, learn = session.act, session.learn
    session.act, session.learn = loop.jit_act(loop.make_act(policy, key), mesh), None
    while session.iteration < total:
        session.step()
        if recorder is not None:
            recorder.record(config.report, is_last=False, progress=progress)
        else:
            progress.tick(session.iteration * frames)
        if check is not None:
            check()
    session.act, session.learn = act, learn
    return loop.play_rollouts(session)


def adapt(
    config: config_lib.Config,
    agent: base.Agent,
    session: loop.Session,
    rollouts: base.Rollouts | None,
) -> tuple[base.AgentState, dict[str, Any]]:
    """Adapts an agent to the rewards of what a session has played.

    Returns:
      The new state, on the session's devices, and facts for `result.json`.
    """
    key = loop.stream_key(config.seed, loop.Stream.ADAPT)
    state, facts = agent.adapt(key, session.state, rollouts)
    facts["agent_steps"] = session.agent_steps
    return devices.device_put(state, session.mesh), facts


def _learn(
    config: config_lib.Config,
    agent: base.Agent,
    session: loop.Session,
    recorder: recorders.Recorder,
    plan: loop.Plan,
    *,
    constructor: loop.MakePool,
    progress: progress_lib.Silent,
    stop: interrupts.StopRequests | None,
) -> tuple[evaluation.Evaluation, list[dict[str, Any]]]:
    """Learns from reward and evaluates on the way.

    Returns:
      The last evaluation, and a summary of each.
    """
    num_envs = session.num_envs
    adapted_at = recorder.facts["adapted"]["agent_steps"]
    session.schedule = plan.schedule(adapted_at)
    first = -(-adapted_at // num_envs)
    total = -(-config.finetune.finetune_agent_steps // num_envs)
    recorder.wait_for_refill(session.schedule, total)
    points = _evaluation_points(config.evaluation, first, total, num_envs)
    evaluations: list[dict[str, Any]] = recorder.facts.setdefault("evaluations", [])
    player = evaluation.make_player(config, agent)
    played: evaluation.Evaluation | None = None

    def evaluate_if_due() -> None:
        nonlocal played
        is_done = any(e["agent_steps"] == session.agent_steps for e in evaluations)
        if session.iteration not in points or is_done:
            return
        state = devices.local(session.state)
        # Before learning, what was pretrained may be used as a whole.
        chosen = player
        if session.iteration == first:
            chosen = evaluation.make_player(config, agent, adapted=True)

        def play() -> dict[str, list[float]]:
            return evaluation.evaluate(  # On one device, of the first process.
                config,
                chosen,
                state,
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
        show()

    def show() -> None:
        progress.start(
            FINETUNE,
            total=total * num_envs * FRAME_SKIP,
            done=session.agent_steps * FRAME_SKIP,
        )

    show()
    evaluate_if_due()
    while session.iteration < total:
        session.step()
        is_last = session.iteration == total
        if is_last:
            recorder.save()
        else:
            recorder.record(config.report, is_last=False, progress=progress)
        evaluate_if_due()
    assert played is not None
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
        set_points = {-(-steps // num_envs) for steps in set_steps} | {first, total}
        return sorted(point for point in set_points if first <= point <= total)
    count = values.evaluations
    points = [first + (total - first) * i // max(count - 1, 1) for i in range(count)]
    return points if count > 1 else [total]


def _warn_of_seed(warn: Callable[[str], None], seed: int, text: str) -> None:
    warn(f"seed {seed}: {text}")


def memory_of(config: config_lib.Config, *, is_pretraining: bool) -> dict[str, Any]:
    """Returns the arguments of `machine.needed_bytes` for a stage.

    An agent's extras are left out: some twenty bytes beside the 7,074 of a step.
    """
    if is_pretraining:
        num_envs, size = config.pretrain.num_envs, config.pretrain.replay_size
    else:
        num_envs = config.finetune.finetune_num_envs
        size = config.finetune.finetune_agent_steps + num_envs
    return {
        "replay_bytes": buffer.num_bytes({}, num_envs=num_envs, size=size),
        "num_devices": config.num_devices,
        "is_copied": config.report.checkpoint_replay,
    }


def check_memory(
    config: config_lib.Config, *, is_pretraining: bool, num_seeds: int = 1
) -> None:
    """Checks that the replay of a stage fits, as `machine.check_memory`."""
    machine.check_memory(
        **memory_of(config, is_pretraining=is_pretraining),
        option="replay_size" if is_pretraining else "finetune_agent_steps",
        num_seeds=num_seeds,
    )


def load_pretrained(
    workdir: folders.PathLike, *, warn: Callable[[str], None] = logging.warning
) -> Trained:
    """Loads the newest agent of a pretraining.

    Args:
      workdir: Folder of a pretraining, or of a run that began with one.
      warn: Is told of damaged checkpoints, and of a pretraining that is not finished.

    Raises:
      ValueError: There is none, or its checkpoint does not fit its own config.
    """
    folder = folders.find_stage(folders.as_path(workdir), PRETRAIN)
    trained = _load(folder, warn, is_finetuned=False)
    total = trained.config.pretrain.pretrain_agent_steps
    if trained.step < total:
        warn(
            f"the pretraining in {folder} is not finished: the agent used is that of "
            f"{trained.step * FRAME_SKIP:,} of {total * FRAME_SKIP:,} frames."
        )
    return trained


def load_finetuned(
    workdir: folders.PathLike, *, warn: Callable[[str], None] = logging.warning
) -> Trained:
    """Loads the newest agent of a fine-tuning, which has adapted to its reward.

    Args:
      workdir: Folder of a fine-tuning, or of a run that ended with one.
      warn: Is told of damaged checkpoints.

    Raises:
      ValueError: There is none, or its checkpoint does not fit its own config.
    """
    folder = folders.find_stage(folders.as_path(workdir), FINETUNE)
    trained = _load(folder, warn, is_finetuned=True)
    if not trained.facts.get("adapted"):
        raise ValueError(f"The run in {folder} has not adapted to its reward yet.")
    return trained


def _load(
    folder: pathlib.Path, warn: Callable[[str], None], *, is_finetuned: bool
) -> Trained:
    _, config = folders.read_run(folder)
    checkpointer = checkpoints.Checkpointer(
        folder / folders.CHECKPOINTS_NAME, warn=warn
    )

    def template(metadata: dict[str, Any]) -> dict[str, Any]:
        agent = config.make_agent(metadata["num_actions"])

        def init(key: types.PRNGKey) -> base.AgentState:
            state = agent.init(key)
            return agent.start_finetune(state) if is_finetuned else state

        return {"agent": jax.eval_shape(init, jax.random.key(0))}

    try:
        found = checkpointer.restore_newest(template)
    finally:
        checkpointer.close()
    if found is None:
        raise ValueError(f"The run in {folder} has no checkpoint yet.")
    num_actions = found.metadata["num_actions"]
    return Trained(
        config,
        config.make_agent(num_actions),
        found.items["agent"],
        num_actions,
        found.metadata,
        found.step,
    )


def _check_fits_config(init: pathlib.Path, config: config_lib.Config) -> None:
    """Checks that a run can take over the agent of a folder, by its config alone."""
    folder = folders.find_stage(init, PRETRAIN)
    _raise_differences(init, folders.read_run(folder)[1], config)


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
    sizes = {"num_actions": (trained.num_actions, num_actions)}
    _raise_differences(folder, trained.config, config, **sizes)


def _raise_differences(
    folder: pathlib.Path,
    there: config_lib.Config,
    here: config_lib.Config,
    **more: tuple[Any, Any],
) -> None:
    pairs = {"game": (there.game, here.game), **more}
    if type(there.learner) is type(here.learner):
        for name in here.entry.transferred:
            pairs[name] = (getattr(there.learner, name), getattr(here.learner, name))
    else:
        pairs["agent"] = (there.agent, here.agent)
    differences = [
        f"{name} is {left!r} there and {right!r} here"
        for name, (left, right) in pairs.items()
        if left != right
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
