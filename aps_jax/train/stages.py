"""The stages of a run: pretraining without reward, and fine-tuning with it.

They know no agent: see `agents.base`.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.agents import base
from aps_jax.envs import games, reward_functions
from aps_jax.parallel import devices, interrupts, processes
from aps_jax.replay import buffer
from aps_jax.runs import checkpoints, folders, machine, metrics
from aps_jax.runs import progress as progress_lib
from aps_jax.train import evaluation, following, loop, recorders

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
    config: config_lib.Config, workdir: folders.PathLike, **watched: Any
) -> dict[str, Any]:
    """Pretrains an agent on a game whose reward it never sees: `pretrain_runs` of one.

    Args:
      config: The run's values.
      workdir: Folder of this stage; made if it does not exist.
      **watched: As for `pretrain_runs`; so are the errors.

    Returns:
      What `result.json` holds. The newest checkpoint holds the agent.
    """
    return pretrain_runs(recorders.make_runs(config, workdir), **watched)[0]


def pretrain_runs(
    runs: recorders.Runs,
    *,
    constructor: loop.MakePool = games.make_pool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> list[dict[str, Any]]:
    """Pretrains one agent or many seeds of it at once, without the game's reward.

    The same call continues runs that were interrupted. It returns at once if they are
    finished.

    Args:
      runs: From `recorders.make_runs`. Folders are made if they do not exist.
      constructor: Makes the environments, as `games.make_pool`.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What the `result.json` of each seed holds.

    Raises:
      ValueError: A folder holds another run, or the agent has no reward-free phase.
      loop.NonFinite: A loss or reward is not finite; nothing is saved after it but the
        batch that it was computed from.
      loop.EnvironmentFailure: The environments raised; a checkpoint was saved.
      interrupts.Interrupted: A stop was requested; a checkpoint was saved.
    """
    started = time.monotonic()
    config, seeds = runs.config, runs.seeds
    if config.report.keep_best:
        raise ValueError(
            "keep_best ranks checkpoints by the score, which a reward-free stage "
            "must not see: leave it out here, and give it to fine-tuning."
        )
    loop.pretrain_plan(config, config.make_agent(2, config.observation))
    found = _find_finished(runs, stage=PRETRAIN)
    if found is not None:
        return found
    mesh, warn = _check_machine(runs, progress, is_pretraining=True)
    with contextlib.ExitStack() as held:
        num_envs, stream = config.pretrain.num_envs, loop.Stream.PRETRAIN_ACT
        part = devices.process_slice(num_envs, mesh)
        pool = loop.make_pool(
            config, num_envs, stream, constructor, part=part, run_seeds=seeds
        )
        held.callback(pool.close)
        lock = _open(held, runs, warn, stage=PRETRAIN)
        agent = config.make_agent(pool.num_actions, pool.observation)
        plan = loop.pretrain_plan(config, agent)
        states = [loop.init_state(agent, seed, mesh) for seed in seeds]
        state = loop.stack_seeds(states, mesh)
        session = loop.start(config, plan, pool, state, mesh=mesh, seeds=seeds)
        del states, state
        columns = metrics.pretrain_columns(plan.phase.learner.metrics)
        with recorders.Recorder(runs, columns, session, lock, warn, stop) as recorder:
            recorder.resume()
            follower = None
            if config.report.skill_steps and agent.play_skills and mesh is None:
                follower = following.Follower(
                    config, agent, plan, session.seeds, constructor
                )
                held.callback(follower.close)
            _explore(config, agent, session, recorder, progress, follower)
        results = [
            {
                **_describe(one, PRETRAIN),
                "pretrain_frames": session.agent_steps * config.observation.frame_skip,
                "updates": int(last_row["updates"]),
                "last_metrics": last_row,
                "skill_following": recorder.facts["skills"][place],
                **_rate(config, session.agent_steps, started),
            }
            for place, (one, last_row) in enumerate(
                zip(runs.configs.values(), recorder.last_rows, strict=True)
            )
        ]
        _write_results(runs, results, warn, stop)
    return results


def _check_machine(
    runs: recorders.Runs, progress: progress_lib.Silent, *, is_pretraining: bool
) -> tuple[devices.Mesh, Callable[[str], None]]:
    """Checks devices, memory and cores; returns the mesh and where warnings go."""
    config = runs.config
    mesh = devices.make_mesh(config.num_devices)
    check_memory(config, is_pretraining=is_pretraining, num_seeds=len(runs.seeds))
    machine.check_cores(config.environment.env_threads, progress.warn)
    return mesh, progress.warn


def _explore(
    config: config_lib.Config,
    agent: base.Agent,
    session: loop.Session,
    recorder: recorders.Recorder,
    progress: progress_lib.Silent,
    follower: following.Follower | None,
) -> None:
    """Pretrains from where the session stands to the end."""
    skills = recorder.facts.setdefault("skills", [None] * len(session.seeds))
    num_envs, mesh, seeds = session.num_envs, session.mesh, session.seeds
    schedule = session.schedule
    assert schedule is not None
    shape: Any = {"num_seeds": len(seeds), "mesh": mesh}
    session.calibrate = functools.partial(
        loop.jit_calibrate(agent, loop.CALIBRATION_STATES, **shape),
        loop.stream_keys(seeds, loop.Stream.CALIBRATE, mesh),
    )
    embed = functools.partial(
        loop.jit_embed(agent, loop.EMBEDDED_STATES, **shape),
        loop.stream_keys(seeds, loop.Stream.EMBED, mesh),
    )
    total = -(-config.pretrain_agent_steps // num_envs)
    recorder.wait_for_refill(schedule, total)
    frames = num_envs * config.observation.frame_skip * len(seeds)
    progress.start(PRETRAIN, total=total * frames, done=session.iteration * frames)
    while session.iteration < total:
        session.step(recorder.steps_to_go(total))
        is_last = session.iteration == total
        if session.agent_steps >= schedule.start and (is_last or recorder.is_row_due()):
            session.prepare_save()
            steps = devices.device_put(np.int32(session.agent_steps), mesh)
            visited = embed(session.state, session.rollout.replay, steps)
            recorder.write_snapshot(jax.device_get(visited))
        more = None
        is_checkpoint = is_last or loop.is_due(
            config.report.checkpoint_agent_steps,
            session.agent_steps,
            config.report.report_agent_steps,
        )
        if (
            follower is not None
            and is_checkpoint
            and (is_last or recorder.is_row_due())
        ):
            found = follower.measure(session.state)
            skills[:] = [loop.without_nan(one._asdict()) for one in found]
            more = [{"skill_following": one.mean} for one in found]
        recorder.record(is_last=is_last, progress=progress, more=more)


def finetune(
    config: config_lib.Config,
    workdir: folders.PathLike,
    init: folders.PathLike | None,
    **watched: Any,
) -> dict[str, Any]:
    """Shows the reward to one agent: `finetune_runs` of one.

    Args:
      config: The run's values.
      workdir: Folder of this stage; made if it does not exist.
      init: Folder of a pretraining whose agent is taken over whole; None starts from
        an untrained agent with the same budget.
      **watched: As for `finetune_runs`; so are the errors.

    Returns:
      What `result.json` holds.
    """
    runs = recorders.make_runs(config, workdir)
    return finetune_runs(runs, None if init is None else [init], **watched)[0]


def finetune_runs(
    runs: recorders.Runs,
    inits: Sequence[folders.PathLike] | None,
    *,
    constructor: loop.MakePool = games.make_pool,
    progress: progress_lib.Silent = progress_lib.SILENT,
    stop: interrupts.StopRequests | None = None,
) -> list[dict[str, Any]]:
    """Shows the reward: one agent or many seeds adapt at once, then learn from it.

    A pretrained agent first plays as it did while pretraining, and adapts to the
    rewards of that play; what it played stays in the replay. An untrained agent learns
    from its first steps. The same call continues runs that were interrupted.

    Args:
      runs: From `recorders.make_runs`. Folders are made if they do not exist.
      inits: Folder of the pretraining that each seed takes over; None starts all from
        untrained agents with the same budget.
      constructor: Makes the environments, as `games.make_pool`.
      progress: Where to show progress; nowhere by default.
      stop: Requests to stop, which are looked at in every step.

    Returns:
      What the `result.json` of each seed holds.

    Raises:
      ValueError: A folder holds another run, or one of `inits` does not fit.
      loop.NonFinite: A loss or reward is not finite; nothing is saved after it but the
        batch that it was computed from.
      loop.EnvironmentFailure: The environments raised; a checkpoint was saved.
      interrupts.Interrupted: A stop was requested; a checkpoint was saved.
    """
    started = time.monotonic()
    config, seeds = runs.config, runs.seeds
    paths = None if inits is None else [folders.as_path(init) for init in inits]
    constructor = reward_functions.constructor_for(
        config.finetune.reward, constructor, config.observation
    )
    for path in paths or ():
        _check_fits_config(path, config)
    found = _find_finished(runs, stage=FINETUNE, inits=paths)
    if found is not None:
        return found
    mesh, warn = _check_machine(runs, progress, is_pretraining=False)
    values = config.finetune
    with contextlib.ExitStack() as held:
        num_envs, stream = values.finetune_num_envs, loop.Stream.FINETUNE_ACT
        part = devices.process_slice(num_envs, mesh)
        pool = loop.make_pool(
            config, num_envs, stream, constructor, part=part, run_seeds=seeds
        )
        held.callback(pool.close)
        agent = config.make_agent(pool.num_actions, pool.observation)
        origins: list[Trained] | None = None
        if paths is not None:
            origins = [load_pretrained(path, warn=warn) for path in paths]
            for origin, path in zip(origins, paths, strict=True):
                check_fits(origin, path, config, pool.num_actions)
            states = [origin.state for origin in origins]
        else:
            states = [loop.init_state(agent, seed, mesh) for seed in seeds]
        lock = _open(held, runs, warn, stage=FINETUNE, inits=paths)
        start_finetune = jax.jit(agent.start_finetune)
        state = loop.stack_seeds([start_finetune(state) for state in states], mesh)
        plan = loop.finetune_plan(config, agent)
        session = loop.start(config, plan, pool, state, mesh=mesh, seeds=seeds)
        del states, state
        columns = metrics.finetune_columns(plan.phase.learner.metrics)
        with recorders.Recorder(runs, columns, session, lock, warn, stop) as recorder:
            if not recorder.resume().get("adapted"):
                if origins is not None:
                    roll_out(
                        config, agent, session, recorder=recorder, progress=progress
                    )
                recorder.facts["adapted"] = _adapt_all(
                    agent, session, is_pretrained=origins is not None
                )
            for adapted in recorder.facts["adapted"]:
                progress.say(adapted["summary"])
            played = _learn(
                config,
                agent,
                session,
                recorder,
                plan,
                constructor=constructor,
                progress=progress,
                stop=stop,
            )
        results = []
        for place, one in enumerate(runs.configs.values()):
            adapted = recorder.facts["adapted"][place]
            origin_step = origins[place].step if origins else None
            results.append(
                {
                    **_describe(one, FINETUNE),
                    "pretrain_frames": (origin_step or 0)
                    * config.observation.frame_skip,
                    "init_agent_steps": origin_step,
                    "finetune_agent_steps": session.agent_steps,
                    "init": None if paths is None else str(paths[place]),
                    **_score(one, played[place]),
                    "evaluations": recorder.facts["evaluations"][place],
                    "reward": values.reward,
                    "adapted": {k: x for k, x in adapted.items() if k != "summary"},
                    "updates": int(recorder.last_rows[place]["updates"]),
                    **_rate(config, session.agent_steps, started),
                }
            )
        _write_results(runs, results, warn, stop)
    return results


def _facts_of(
    runs: recorders.Runs, stage: str, inits: Sequence[pathlib.Path] | None
) -> dict[pathlib.Path, dict[str, Any]]:
    """Returns what the `config.json` of each folder of a stage says, by folder."""
    shared: dict[str, Any] = {"stage": stage, "seeds": runs.shared_seeds}
    found = {}
    for place, (folder, config) in enumerate(runs.configs.items()):
        init = None if inits is None else str(inits[place])
        is_of_pretraining = stage == PRETRAIN
        facts = {} if is_of_pretraining else {"init": init}
        found[folder] = {**shared, "config": config, **facts}
    if runs.shared_seeds:
        found[runs.workdir] = {**shared, "config": runs.config, "is_shared": True}
    return found


def _find_finished(
    runs: recorders.Runs, *, stage: str, inits: Sequence[pathlib.Path] | None = None
) -> list[dict[str, Any]] | None:
    """Returns the results of finished runs; asked before emulators start.

    Raises:
      ValueError: A folder holds another run.
    """

    def find() -> list[dict[str, Any]] | None:
        for folder, facts in _facts_of(runs, stage, inits).items():
            if not (folder / folders.CONFIG_NAME).exists():
                return None
            folders.open_run(folder, **facts)
        results = [folders.find_result(folder) for folder in runs.configs]
        found = [result for result in results if result is not None]
        return found if len(found) == len(results) else None

    return processes.broadcast_from_primary(find)


def _open(
    held: contextlib.ExitStack,
    runs: recorders.Runs,
    warn: Callable[[str], None],
    *,
    stage: str,
    inits: Sequence[pathlib.Path] | None = None,
) -> folders.RunLock | None:
    """Claims the folders of runs, and locks that of the checkpoints.

    Raises:
      ValueError: As `folders.open_run`; or not all processes see the folder.
    """

    def claim() -> None:
        # The folder of many seeds holds theirs, so that it is claimed first.
        for folder, facts in reversed(_facts_of(runs, stage, inits).items()):
            folders.open_run(folder, **facts)

    processes.broadcast_from_primary(claim)
    processes.check_shared(runs.workdir)
    if not processes.is_primary():
        return None
    return held.enter_context(folders.RunLock(runs.workdir, warn=warn))


def _write_results(
    runs: recorders.Runs,
    results: Sequence[dict[str, Any]],
    warn: Callable[[str], None],
    stop: interrupts.StopRequests | None,
) -> None:
    """Writes `result.json` of each seed, however long the disk is full."""

    def write() -> None:
        for folder, result in zip(runs.configs, results, strict=True):
            folders.write_json(folder / folders.RESULT_NAME, result)

    processes.broadcast_from_primary(lambda: recorders.patiently(write, warn, stop))


def roll_out(
    config: config_lib.Config,
    agent: base.Agent,
    session: loop.Session,
    *,
    recorder: recorders.Recorder | None = None,
    progress: progress_lib.Silent = progress_lib.SILENT,
    check: Callable[[], None] | None = None,
) -> None:
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
    policy = loop.pretrain_plan(config, agent).phase.policy
    total = -(-config.finetune.infer_agent_steps // session.num_envs)
    frames = session.num_envs * config.observation.frame_skip * len(session.seeds)
    progress.start("infer", total=total * frames, done=session.iteration * frames)
    seeds, mesh = session.seeds, session.mesh
    act, act_key, learn = session.act, session.act_key, session.learn
    session.act = loop.jit_act(policy, num_seeds=len(seeds), mesh=mesh)
    session.act_key = loop.stream_keys(seeds, loop.Stream.INFER_ACT, mesh)
    session.learn = None
    while session.iteration < total:
        session.step(1 if recorder is None else recorder.steps_to_go(total))
        if recorder is not None:
            recorder.record(is_last=False, progress=progress)
        else:
            progress.tick(session.iteration * frames)
        if check is not None:
            check()
    session.act, session.act_key, session.learn = act, act_key, learn


def adapt(
    agent: base.Agent,
    session: loop.Session,
    rollouts: base.Rollouts | None,
    place: int = 0,
) -> tuple[base.AgentState, dict[str, Any]]:
    """Adapts the agent of the seed at a place to the rewards of what was played.

    Returns:
      The new state, on the session's devices, and facts for `result.json`.
    """
    key = loop.stream_key(session.seeds[place], loop.Stream.ADAPT)
    state, facts = agent.adapt(key, session.part(session.state, place), rollouts)
    facts["agent_steps"] = session.agent_steps
    return devices.device_put(state, session.mesh), facts


def _adapt_all(
    agent: base.Agent, session: loop.Session, *, is_pretrained: bool
) -> list[dict[str, Any]]:
    """Adapts every seed to what it has played; returns the facts of each."""
    adapted = []
    for place in range(len(session.seeds)):
        rollouts = loop.play_rollouts(session, place) if is_pretrained else None
        adapted.append(adapt(agent, session, rollouts, place))
    session.state = loop.stack_seeds([state for state, _ in adapted], session.mesh)
    return [facts for _, facts in adapted]


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
) -> list[evaluation.Evaluation]:
    """Learns from reward and evaluates on the way, of which `recorder.facts` tell.

    Returns:
      The last evaluation of each seed.
    """
    num_envs, seeds = session.num_envs, session.seeds
    adapted_at = recorder.facts["adapted"][0]["agent_steps"]
    session.schedule = plan.schedule(adapted_at)
    first = -(-adapted_at // num_envs)
    total = -(-config.finetune.finetune_agent_steps // num_envs)
    recorder.wait_for_refill(session.schedule, total)
    points = _evaluation_points(config.evaluation, first, total, num_envs)
    evaluations = recorder.facts.setdefault("evaluations", [[] for _ in seeds])
    configs = [config_lib.replace_options(config, seed=seed) for seed in seeds]
    player = evaluation.make_player(config, agent)
    played: list[evaluation.Evaluation] = []

    def evaluate_if_due() -> None:
        nonlocal played
        is_done = any(e["agent_steps"] == session.agent_steps for e in evaluations[0])
        # The last is played again where a run was killed after it: games are no facts.
        is_skipped = is_done and session.iteration < total
        if session.iteration not in points or is_skipped:
            return
        chosen = player
        # Before learning, what was pretrained may be used as a whole.
        if session.iteration == first:
            chosen = evaluation.make_player(config, agent, adapted=True)

        def play() -> list[dict[str, list[float]]]:
            return [
                evaluation.evaluate(  # On one device, of the first process.
                    one,
                    chosen,
                    devices.local(session.part(session.state, place)),
                    constructor=constructor,
                    progress=progress,
                    stop=stop,
                ).to_lists()
                for place, one in enumerate(configs)
            ]

        lists = processes.broadcast_from_primary(play)
        played = [evaluation.from_lists(values) for values in lists]
        if is_done:
            return
        rows = session.rows()
        for place, one in enumerate(played):
            summary = evaluation.summary(config, one)
            evaluations[place].append(
                {"agent_steps": session.agent_steps, **loop.without_nan(summary)}
            )
            rows[place] |= summary
        recorder.write(rows)
        show()

    def show() -> None:
        frames = num_envs * config.observation.frame_skip * len(seeds)
        progress.start(FINETUNE, total=total * frames, done=session.iteration * frames)

    show()
    evaluate_if_due()
    while session.iteration < total:
        to_point = min(point for point in points if point > session.iteration)
        to_point -= session.iteration
        session.step(min(to_point, recorder.steps_to_go(total)))
        is_last = session.iteration == total
        if is_last:
            recorder.save()
        else:
            recorder.record(is_last=False, progress=progress)
        evaluate_if_due()
    return played


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


def memory_of(config: config_lib.Config, *, is_pretraining: bool) -> dict[str, Any]:
    """Returns the arguments of `machine.needed_bytes` for a stage.

    An agent's extras are left out: some twenty bytes beside the 7,186 of a step.
    """
    if is_pretraining:
        num_envs, size = config.pretrain.num_envs, config.pretrain.replay_size
    else:
        num_envs = config.finetune.finetune_num_envs
        size = config.finetune.finetune_agent_steps + num_envs
    return {
        "replay_bytes": buffer.num_bytes(
            config.observation, {}, num_envs=num_envs, size=size
        ),
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
    total = trained.config.pretrain_agent_steps
    if trained.step < total:
        warn(
            f"the pretraining in {folder} is not finished: the agent used is that of "
            f"{trained.step:,} of {total:,} agent steps."
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
    described, config = folders.read_run(folder)
    if described.get("is_shared"):
        raise ValueError(
            f"{folder} holds what the seeds {described['seeds']} share: name the "
            "folder of one of them."
        )
    checkpointer = checkpoints.Checkpointer(
        folder / folders.CHECKPOINTS_NAME, warn=warn
    )

    def template(metadata: dict[str, Any]) -> dict[str, Any]:
        agent = config.make_agent(metadata["num_actions"], _observation_of(metadata))

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
        config.make_agent(num_actions, _observation_of(found.metadata)),
        found.items["agent"],
        num_actions,
        found.metadata,
        found.step,
    )


def _observation_of(metadata: dict[str, Any]) -> types.ObservationSpec:
    frame_shape, *others = metadata["observation"]
    return types.ObservationSpec(tuple(frame_shape), *others)


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
        "reward": config.finetune.reward,
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


def _rate(
    config: config_lib.Config, agent_steps: int, started: float
) -> dict[str, Any]:
    seconds = time.monotonic() - started
    return {
        "wall_seconds": round(seconds, 3),
        "frames_per_second": round(
            agent_steps * config.observation.frame_skip / seconds, 1
        ),
        "device": jax.devices()[0].platform,
        "git_commit": folders.git_commit(),
    }
