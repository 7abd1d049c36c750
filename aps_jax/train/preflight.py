"""Preflight: whether a machine can do a run, and how long it will take, before it starts.

A stage checks the same at every start, but for the measured rate.
"""

import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table

from aps_jax import config as config_lib
from aps_jax.agents import aps as agent_lib
from aps_jax.config import FRAME_SKIP
from aps_jax.envs import atari
from aps_jax.parallel import devices, processes
from aps_jax.replay import buffer
from aps_jax.runs import machine, metrics
from aps_jax.train import loop, seeds, stages

_MOST_ACTIONS = 18  # of any Atari game
_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


class Check(NamedTuple):
    """One line of the table."""

    name: str
    found: str
    verdict: str = "ok"  # ok, warning or failed


def run_checks(
    config: config_lib.Config,
    workdir: pathlib.Path,
    stage_names: Sequence[str],
    *,
    seconds: float,
    constructor: loop.MakePool = atari.AtariPool,
    num_seeds: int = 1,
) -> list[Check]:
    """Checks the machine and measures the rate of each stage.

    Args:
      config: The run's values.
      workdir: The run's folder, which need not exist and is not made.
      stage_names: `pretrain`, `finetune` or both.
      seconds: How long the rate of each stage is measured, after it has compiled.
      constructor: Makes the environments.
      num_seeds: Seeds that pretrain at once, and fine-tune one after another.

    Returns:
      A `Check` for each line of the table; one that failed would end the run.
    """
    checks = [_devices(config), _cores(config)]
    if config.num_devices > 1:
        checks += [_share(config, name) for name in stage_names]
    at_once = {stages.PRETRAIN: num_seeds}
    checks += [_memory(config, name, at_once.get(name, 1)) for name in stage_names]
    place = next(p for p in [workdir, *workdir.absolute().parents] if p.is_dir())
    try:
        machine.check_writable(place)
        checks.append(Check("work directory", f"{place} can be written"))
    except ValueError as error:
        checks.append(Check("work directory", str(error), "failed"))
    checks += [_disk(config, place, name, num_seeds) for name in stage_names]
    if processes.num_processes() > 1:
        checks = _of_all(checks)
    if any(check.verdict == "failed" for check in checks):
        return checks
    for name in stage_names:
        checks.append(_rate(config, name, seconds, constructor, num_seeds))
    return checks


def print_table(checks: Sequence[Check]) -> None:
    """Prints the checks as a table of one screen."""
    table = rich.table.Table("check", "found", "verdict", title="Preflight")
    for check in checks:
        style = _STYLES[check.verdict]
        table.add_row(check.name, check.found, f"[{style}]{check.verdict}[/]")
    rich.console.Console().print(table)


def _of_all(checks: list[Check]) -> list[Check]:
    """Puts together what the processes of several hosts have found."""
    found = [Check("processes", processes.describe())]
    for index, own in enumerate(processes.all_gather(checks)):
        for name, *rest in own:
            found.append(Check(f"process {index}: {name}", *rest))
    return found


def _devices(config: config_lib.Config) -> Check:
    there = jax.devices()
    text = f"{len(there)} x {there[0].device_kind} ({there[0].platform})"
    try:
        devices.make_mesh(config.num_devices)
    except ValueError as error:
        return Check("devices", str(error), "failed")
    if config.num_devices > 1:
        text += f", {config.num_devices} of them used"
    is_slow = there[0].platform == "cpu" and config.preset in ("gpu", "paper")
    if is_slow:
        text += f"; preset {config.preset} is made for a GPU or TPU"
    return Check("devices", text, "warning" if is_slow else "ok")


def _share(config: config_lib.Config, name: str) -> Check:
    """Says what lies on each of several devices."""
    is_pretraining = name == stages.PRETRAIN
    learner, count = config.learner, config.num_devices
    ring = machine.replay_bytes(config, is_pretraining=is_pretraining)
    num_envs = config.finetune.finetune_num_envs
    if is_pretraining:
        num_envs = config.pretrain.num_envs
    text = (
        f"{num_envs // count} environments and their replay "
        f"({machine.size_text(ring / count)}); "
        f"{learner.batch_size // count} targets"
    )
    if is_pretraining:
        text += f" and {learner.num_particles // count} particles"
    return Check(f"each device, {name}", f"{text} of a batch; the whole agent")


def _cores(config: config_lib.Config) -> Check:
    warnings: list[str] = []
    machine.check_cores(config, warnings.append)
    text = f"{machine.usable_cores():g} that this process may use"
    return Check("cores", "; ".join([text, *warnings]), "warning" if warnings else "ok")


def _memory(config: config_lib.Config, name: str, num_seeds: int) -> Check:
    of_stage = {"is_pretraining": name == stages.PRETRAIN, "num_seeds": num_seeds}
    needed = machine.needed_bytes(config, **of_stage)
    ring = num_seeds * machine.replay_bytes(
        config, is_pretraining=name == stages.PRETRAIN
    )
    text = (
        f"needs about {machine.size_text(needed)}, "
        f"{machine.size_text(ring)} of it the replay; "
        f"{machine.size_text(machine.available_bytes())} free"
    )
    try:
        machine.check_memory(config, **of_stage)
    except ValueError as error:
        return Check(f"memory, {name}", str(error), "failed")
    return Check(f"memory, {name}", text)


def _disk(
    config: config_lib.Config, place: pathlib.Path, name: str, num_seeds: int
) -> Check:
    warnings: list[str] = []
    replay_bytes = machine.replay_bytes(config, is_pretraining=name == stages.PRETRAIN)
    size = replay_bytes if config.report.checkpoint_replay else 0
    agent = agent_lib.make_agent(
        config.learner, config.finetune, num_actions=_MOST_ACTIONS
    )
    state = jax.eval_shape(agent.init, jax.random.key(0))
    fixed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    try:
        machine.check_disk(
            place,
            fixed_bytes=num_seeds * fixed,
            replay_bytes=num_seeds * size,
            kept=config.report.keep_checkpoints,
            warn=warnings.append,
        )
    except ValueError as error:
        return Check(f"disk, {name}", str(error), "failed")
    text = f"a checkpoint takes up to {machine.size_text(fixed + size)}"
    return Check(
        f"disk, {name}", "; ".join([text, *warnings]), "warning" if warnings else "ok"
    )


def _rate(
    config: config_lib.Config,
    name: str,
    seconds: float,
    constructor: loop.MakePool,
    num_seeds: int,
) -> Check:
    is_pretraining = name == stages.PRETRAIN
    if is_pretraining and num_seeds > 1:
        frames_per_second = measure_seeds_rate(config, num_seeds, seconds, constructor)
    else:
        frames_per_second = measure_rate(config, name, seconds, constructor)
    frames = num_seeds * (
        config.pretrain.pretrain_frames
        if is_pretraining
        else config.finetune.finetune_agent_steps * FRAME_SKIP
    )
    hours = frames / frames_per_second / 3600
    text = (
        f"{frames_per_second:,.0f} frames/s over {seconds:g} s: {frames:,} frames take "
        f"{hours:,.2f} hours"
    )
    if name == stages.FINETUNE:
        text += ", and evaluations come on top"
    return Check(f"rate, {name}", text)


def measure_rate(
    config: config_lib.Config,
    name: str,
    seconds: float,
    constructor: loop.MakePool = atari.AtariPool,
) -> float:
    """Runs a stage's loop for some seconds, from nothing and saving nothing.

    Learning begins as soon as the replay can be sampled, so that it is the rate of all
    but the warm-up.

    Returns:
      Emulator frames per second.
    """
    is_pretraining = name == stages.PRETRAIN
    learner, values = config.learner, config.finetune
    if is_pretraining:
        num_envs, size = config.pretrain.num_envs, config.pretrain.replay_size
        samples_per_step = config.pretrain.samples_per_step
        act_stream, stream = loop.Stream.PRETRAIN_ACT, loop.Stream.PRETRAIN_LEARN
    else:
        num_envs, size = values.finetune_num_envs, values.finetune_agent_steps
        samples_per_step = values.finetune_samples_per_step
        act_stream, stream = loop.Stream.FINETUNE_ACT, loop.Stream.FINETUNE_LEARN
    mesh = devices.make_mesh(config.num_devices)
    pool = loop.make_pool(config, num_envs, act_stream, constructor, mesh)
    try:
        agent = agent_lib.make_agent(learner, values, num_actions=pool.num_actions)
        ring = buffer.make_replay(
            num_envs=num_envs, size=size, feature_dim=learner.feature_dim
        )
        key = loop.stream_key(config.seed, stream)
        sample = loop.make_sample(
            ring, learner, key, with_particles=is_pretraining, mesh=mesh
        )
        state, group = loop.init_state(agent, config.seed, mesh), metrics.LEARNING
        if is_pretraining:
            group = group + metrics.PRETRAINING
            learn = loop.make_pretrain_learn(agent, sample, mesh)
        else:
            state = devices.put(jax.jit(agent.init_finetune)(state), mesh)
            task = jnp.zeros((learner.feature_dim,)).at[0].set(1.0)
            learn = loop.make_finetune_learn(
                agent, sample, task=task, reward_scale=jnp.float32(1.0), mesh=mesh
            )
        session = loop.Session(
            pool=pool,
            state=state,
            memory=loop.init_memory(
                agent,
                ring,
                num_envs=num_envs,
                feature_dim=learner.feature_dim,
                mesh=mesh,
            ),
            sums=devices.put(metrics.init_sums(loop.names_of(group)), mesh),
            mesh=mesh,
        )
        act = loop.make_act(
            agent,
            ring,
            loop.stream_key(config.seed, act_stream),
            epsilon=config.pretrain.pretrain_epsilon,
            explore=is_pretraining,
            mesh=mesh,
        )
        schedule = loop.Schedule(
            start=learner.window_length * num_envs,
            samples_per_step=samples_per_step,
            batch_size=learner.batch_size,
        )
        return _play(session, act, learn, schedule, seconds)
    finally:
        pool.close()


def measure_seeds_rate(
    config: config_lib.Config,
    num_seeds: int,
    seconds: float,
    constructor: loop.MakePool = atari.AtariPool,
) -> float:
    """Does what `measure_rate` does for the pretraining of many seeds at once.

    Returns:
      Emulator frames per second of all seeds together.
    """
    num_envs = config.pretrain.num_envs
    run_seeds = range(config.seed, config.seed + num_seeds)
    stream = loop.Stream.PRETRAIN_ACT
    pool = loop.make_pool(config, num_envs, stream, constructor, run_seeds=run_seeds)
    try:
        parts = seeds.make_pretraining(config, run_seeds, pool)
        start = config.learner.window_length * num_envs
        schedule = parts.schedule._replace(start=start)
        session = parts.session
        return num_seeds * _play(session, parts.act, parts.learn, schedule, seconds)
    finally:
        pool.close()


def _play(
    session: loop.Session,
    act: loop.Act,
    learn: loop.Learn,
    schedule: loop.Schedule,
    seconds: float,
) -> float:
    """Returns the frames per second of a new session, without what compiling takes."""
    while session.agent_steps <= schedule.start + session.num_envs:
        session.step(act)
    if schedule.samples_per_step > 0:
        state, sums = learn(session.state, session.sums, session.memory.replay)
        session.state, session.sums = state, sums
    jax.block_until_ready(session.state)
    before, started = session.agent_steps, time.monotonic()
    # Several processes end at the same step.
    while not processes.any_process(time.monotonic() - started >= seconds):
        for _ in range(8):  # To ask takes a millisecond.
            session.step(act, learn, schedule)
    jax.block_until_ready(session.state)
    played = session.agent_steps - before
    return played * FRAME_SKIP / (time.monotonic() - started)
