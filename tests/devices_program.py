r"""Runs steps on 1 and 8 virtual devices, or stages on 2, and writes what they leave.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python devices_program.py FOLDER steps

A program of its own, because the number of devices is fixed when JAX starts.
"""

import contextlib
import functools
import json
import math
import pathlib
import re
import sys

import fakes
import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.envs import atari
from aps_jax.parallel import devices, interrupts
from aps_jax.replay import buffer
from aps_jax.train import loop, stages

NUM_ENVS, LENGTH, DIM = 8, 30, 2
NUM_UPDATES = 100
# Of 8 particles one device encodes 3, 3 and 2; of eight devices each its one.
buffer.CHUNK_SIZE = 3
loop.CALIBRATION_STATES = 240
CONFIG = config_lib.replace_options(
    config_lib.Config(),
    game="Chain",
    encoder="small",
    hidden_units=8,
    feature_dim=DIM,
    num_neighbors=3,
    num_particles=8,
    n_steps=2,
    batch_size=16,
    window_targets=2,
    target_period=10,
    # At ten times the rate, the usual one, updates amplify each other's rounding: the
    # losses of 60 updates agree to 1e-6, and those after them to 1e-4.
    feature_learning_rate=1e-5,
    finetune_learning_rate=1e-5,
)
ON_PLANES = config_lib.replace_options(CONFIG, game=fakes.PLANES, encoder="mlp")
DQN = config_lib.replace_options(
    config_lib.preset_config("smoke", "dqn"),
    game=fakes.PLANES,
    encoder="mlp",
    target_period=10,
    learning_rate=1e-5,  # As that of the features: rounding is not amplified.
)
KEY = jax.random.key(3)
# Pretraining on images shows that from reward nothing but the update differs.
LEARNED = {"pretrain": CONFIG, "finetune": ON_PLANES, "dqn": DQN}
# Smaller than Atari's, for speed.
IMAGES = types.ObservationSpec((36, 36), 4, 4)

_COLLECTIVE = re.compile(
    r" = (\(?\w+\[.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")


def collectives(compiled):
    """Returns the kind and the bytes of every collective of a compiled step."""
    found = [_COLLECTIVE.search(line) for line in compiled.as_text().splitlines()]
    return sorted([match[2], num_bytes(match[1])] for match in found if match)


def num_bytes(result):
    """Returns the bytes of a result as XLA writes it, such as (f32[3], f32[])."""
    total = 0
    for kind, sides in _SHAPE.findall(result):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        shape = [int(side) for side in sides.split(",") if side]
        total += int(np.prod(shape)) * bits // 8
    return total


def random_replay(mesh, observation, extras):
    """A full buffer that has gone around, in which games end and tasks change."""
    rng = np.random.default_rng(0)
    shape = (NUM_ENVS, LENGTH)
    task = rng.normal(size=(*shape, DIM)).astype(np.float32)
    task /= np.linalg.norm(task, axis=-1, keepdims=True)
    steps = buffer.Step(
        frame=rng.integers(
            256 if observation.is_image else 2,
            size=(*shape, math.prod(observation.frame_shape)),
            dtype=np.uint8,
        ),
        action=rng.integers(0, 3, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32),
        terminated=rng.random(shape) < 0.1,
        is_first=rng.random(shape) < 0.1,
        life_lost=rng.random(shape) < 0.1,
        id=np.arange(NUM_ENVS * LENGTH, dtype=np.int32).reshape(shape),
        extras={"task": np.repeat(task[:, ::6], 6, axis=1)} if extras else {},
    )
    state = buffer.Buffer(steps, np.int32(7), np.bool_(True))
    return devices.device_put(state, mesh, loop.REPLAY_SPECS)


def learned(name, num_devices):
    """Makes updates; returns what they leave, and the collectives of one."""
    config, is_pretraining = LEARNED[name], name == "pretrain"
    mesh = devices.make_mesh(num_devices)
    observation = IMAGES if is_pretraining else config.observation
    agent = config.make_agent(3, observation)
    state = loop.init_state(agent, 0, mesh)
    plan = loop.finetune_plan(config, agent)
    if is_pretraining:
        plan = loop.pretrain_plan(config, agent)
    else:
        state, _ = agent.adapt(KEY, agent.start_finetune(state), None)
        state = devices.device_put(state, mesh)
    learner = plan.phase.learner
    kind = {"reward_free": is_pretraining, "mesh": mesh}
    draw = loop.make_draw(plan.phase, **kind)
    learn, key = loop.jit_learn(plan.phase, **kind), devices.device_put(KEY, mesh)
    names = loop.names_of(learner.metrics)
    sums = devices.device_put(loop.init_sums(names), mesh)
    extras = loop.replayed_extras(plan.phase.policy, state)
    replay = random_replay(mesh, observation, extras)
    number = devices.device_put(np.int32(5), mesh)
    drawn = jax.jit(draw)(key, state, replay, number)
    start = jax.device_get(state.params)
    learn = learn.lower(key, state, sums, replay).compile()
    losses = []
    for _ in range(NUM_UPDATES):
        before = float(sums.totals["loss_td"])
        state, sums, _ = learn(key, state, sums, replay)
        losses.append(float(sums.totals["loss_td"]) - before)
    left = {
        "ids": drawn.windows.id,
        "losses": losses,
        "state": state._replace(opt_state=None),
        "sums": sums,
        "moved": {
            name: max(
                np.max(np.abs(x - y))
                for x, y in zip(
                    jax.tree.leaves(start[name]),
                    jax.tree.leaves(jax.device_get(state.params[name])),
                    strict=True,
                )
            )
            for name in start
        },
    }
    if is_pretraining:
        left = jax.device_get(left)  # Calibration destroys the state.
        left["particle_ids"] = drawn.particles.id
        calibrate = loop.jit_calibrate(agent, loop.CALIBRATION_STATES, mesh=mesh)
        left["calibrated"] = calibrate(key, state, replay).stats.calibrated
    return jax.device_get(left), collectives(learn)


def acted(num_devices):
    """Acts on the chain; returns the replay, and what one step communicates."""
    mesh = devices.make_mesh(num_devices)
    agent = CONFIG.make_agent(3, atari.OBSERVATION)
    policy = loop.pretrain_plan(CONFIG, agent).phase.policy
    state = loop.init_state(agent, 0, mesh)
    act = loop.jit_act(policy, mesh=mesh)
    session = loop.Session(
        pool=loop.make_pool(
            CONFIG, NUM_ENVS, loop.Stream.PRETRAIN_ACT, fakes.ChainPool
        ),
        state=state,
        rollout=loop.init_rollout(
            policy, state, num_envs=NUM_ENVS, replay_size=NUM_ENVS * LENGTH, mesh=mesh
        ),
        sums=devices.device_put(loop.init_sums(["loss_td"]), mesh),
        act=act,
        act_key=devices.device_put(KEY, mesh),
        learn_key=devices.device_put(KEY, mesh),
        seeds=(0,),
        mesh=mesh,
    )
    session.step()
    timestep = devices.device_put(session.timestep, mesh, devices.SHARDED)
    compiled = act.lower(
        session.act_key, session.state, session.rollout, timestep
    ).compile()
    for _ in range(LENGTH - 2):
        session.step()
    rollouts = loop.play_rollouts(session)
    frames = rollouts.encode(lambda state, w: w.observation[:, 0, 0], session.state)
    for _ in range(6):
        session.step()
    rollout = session.rollout
    where = {
        "replay": rollout.replay.experience.frame.sharding.shard_shape(
            rollout.replay.experience.frame.shape
        ),
        "stack": rollout.actor.stack.sharding.shard_shape(rollout.actor.stack.shape),
    }
    kept = rollout.replay.experience._replace(frame=None)
    left = {"replay": kept, "rollouts": (rollouts.reward, frames), "where": where}
    return jax.device_get(left), collectives(compiled), act._cache_size()


class StopOnce:
    """Asks a stage to stop at the n-th question."""

    def __init__(self, count):
        self._left = count

    def is_requested(self):
        self._left -= 1
        return self._left == 0

    def obey(self):
        raise interrupts.Interrupted("stopped")

    def check(self):
        pass  # Evaluations are not stopped.


def stages_on_two(folder, *, is_stopped):
    """Pretrains and fine-tunes on the chain on two devices, stopped once or not at all.

    Pretraining goes on on two devices, fine-tuning on one.
    """
    options = {
        "game": fakes.PLANES,
        "encoder": "mlp",
        "pretrain_frames": 4 * 160,
        "replay_size": 160,
        "warmup_agent_steps": 60,
        "report_agent_steps": 80,
        "checkpoint_agent_steps": 1000,
        "finetune_agent_steps": 120,
        "infer_agent_steps": 60,
        "evaluations": 1,
    }
    config = config_lib.replace_options(config_lib.preset_config("smoke"), **options)
    pretrain = functools.partial(
        stages.pretrain, workdir=folder / "pretrain", constructor=fakes.PlanesPool
    )
    finetune = functools.partial(
        stages.finetune,
        workdir=folder / "finetune",
        init=folder / "pretrain",
        constructor=fakes.PlanesPool,
    )
    for stage, goes_on_with in ((pretrain, 2), (finetune, 1)):
        count = 2
        if is_stopped:
            with contextlib.suppress(interrupts.Interrupted):
                stage(
                    config_lib.replace_options(config, num_devices=2),
                    stop=StopOnce(25),
                )
            count = goes_on_with
        stage(config_lib.replace_options(config, num_devices=count))
    return {
        "pretrained": stages.load_pretrained(folder / "pretrain").state,
        "finetuned": stages.load_finetuned(folder / "finetune").state,
    }


def flat(tree):
    """Returns a pytree as arrays by path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def leave_stages(folder):
    """Leaves the agents of runs that were stopped once or not at all."""
    for name, is_stopped in (("straight", False), ("stopped", True)):
        left = stages_on_two(folder / name, is_stopped=is_stopped)
        np.savez(folder / f"{name}.npz", **flat(jax.device_get(left)))


def leave_steps(folder):
    """Leaves what updates and acting do on 1 and on 8 devices."""
    facts = {}
    for count in (1, 8):
        for name in LEARNED:
            left, facts[f"{name}_{count}"] = learned(name, count)
            np.savez(folder / f"{name}_{count}.npz", **flat(left))
        left, facts[f"act_{count}"], facts[f"traces_{count}"] = acted(count)
        facts[f"where_{count}"] = left.pop("where")
        np.savez(folder / f"act_{count}.npz", **flat(left))
    for name, config in LEARNED.items():
        params = config.make_agent(3, config.observation).init(KEY).params
        facts[f"params_bytes_{name}"] = sum(x.nbytes for x in jax.tree.leaves(params))
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    {"steps": leave_steps, "stages": leave_stages}[sys.argv[2]](
        pathlib.Path(sys.argv[1])
    )
