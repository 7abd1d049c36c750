"""Runs steps on 1 and 8 virtual devices, or stages on 2, and writes what they leave.

  XLA_FLAGS=--xla_force_host_platform_device_count=8 python devices_program.py FOLDER steps

A program of its own, because the number of devices is fixed when JAX starts.
"""

import contextlib
import functools
import json
import pathlib
import re
import sys

import fakes
import jax
import numpy as np

from aps_jax import config as config_lib
from aps_jax.agents import aps as agent_lib
from aps_jax.parallel import devices, interrupts
from aps_jax.replay import buffer
from aps_jax.runs import metrics
from aps_jax.train import loop, stages

NUM_ENVS, LENGTH, DIM = 8, 30, 2
NUM_UPDATES = 100
# Of 8 particles one device encodes 3, 3 and 2; of two devices each 2 and 2; of eight each
# its one.
buffer.CHUNK_SIZE = 3
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
)
AGENT = agent_lib.make_agent(CONFIG.learner, CONFIG.finetune, num_actions=3)
RING = buffer.make_replay(num_envs=NUM_ENVS, size=NUM_ENVS * LENGTH, feature_dim=DIM)
KEY = jax.random.key(3)

_COLLECTIVE = re.compile(
    r" = \(?(\w+\[[\d,]*\]).* (all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(compiled):
    """Returns the kind and the result of every collective of a compiled step."""
    found = [_COLLECTIVE.search(line) for line in compiled.as_text().splitlines()]
    return sorted([match[2], match[1]] for match in found if match)


def random_replay(mesh):
    """A ring that has gone around, in which games end and tasks change."""
    rng = np.random.default_rng(0)
    shape = (NUM_ENVS, LENGTH)
    task = rng.normal(size=(*shape, DIM)).astype(np.float32)
    task /= np.linalg.norm(task, axis=-1, keepdims=True)
    steps = buffer.Step(
        frame=rng.integers(0, 255, (*shape, 84, 84)).astype(np.uint8),
        action=rng.integers(0, 3, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32),
        terminated=rng.random(shape) < 0.1,
        is_first=rng.random(shape) < 0.1,
        life_lost=rng.random(shape) < 0.1,
        task=np.repeat(task[:, ::6], 6, axis=1),
        id=np.arange(NUM_ENVS * LENGTH, dtype=np.int32).reshape(shape),
    )
    state = buffer.ReplayState(
        experience=steps, current_index=np.int32(7), is_full=np.bool_(True)
    )
    specs = jax.tree.map(
        lambda x: devices.SHARDED if np.ndim(x) else devices.REPLICATED, state
    )
    return devices.device_put(state, mesh, specs)


def learned(num_devices, *, is_pretraining):
    """Makes updates; returns what they leave, and the collectives of one."""
    mesh = devices.make_mesh(num_devices)
    sample = loop.make_sample(
        RING, CONFIG.learner, KEY, with_particles=is_pretraining, mesh=mesh
    )
    state, names = loop.init_state(AGENT, 0, mesh), metrics.LEARNING
    if is_pretraining:
        names = names + metrics.PRETRAINING
        learn = loop.make_pretrain_learn(AGENT, sample, mesh)
    else:
        state = devices.device_put(AGENT.init_finetune(state), mesh)
        task = np.float32([0.6, 0.8])
        learn = loop.make_finetune_learn(
            AGENT, sample, task=task, reward_scale=np.float32(2.0), mesh=mesh
        )
    sums = devices.device_put(loop.init_sums(loop.names_of(names)), mesh)
    ring = random_replay(mesh)
    drawn = jax.jit(sample.drawn)(ring, devices.device_put(np.int32(5), mesh))
    start = jax.device_get(state.params)
    learn = learn.lower(state, sums, ring).compile()
    losses = []
    for _ in range(NUM_UPDATES):
        before = float(sums.sums["loss_td"])
        state, sums = learn(state, sums, ring)
        losses.append(float(sums.sums["loss_td"]) - before)
    left = {
        "ids": [window.id for window in drawn.values()],
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
            for name in ("features", "successor")
        },
    }
    if is_pretraining and num_devices in (1, 8):
        left["calibrated"] = loop.make_calibrate(AGENT, RING, KEY, mesh)(
            state.params, ring
        )
    return jax.device_get(left), collectives(learn)


def acted(num_devices):
    """Acts on the chain; returns the replay, and what one step communicates."""
    mesh = devices.make_mesh(num_devices)
    session = loop.Session(
        pool=loop.make_pool(
            CONFIG, NUM_ENVS, loop.Stream.PRETRAIN_ACT, fakes.ChainPool
        ),
        state=loop.init_state(AGENT, 0, mesh),
        memory=loop.init_memory(
            AGENT, RING, num_envs=NUM_ENVS, feature_dim=DIM, mesh=mesh
        ),
        sums=devices.device_put(loop.init_sums(["loss_td"]), mesh),
        mesh=mesh,
    )
    act = loop.make_act(
        AGENT, RING, KEY, epsilon=0.5, explore=True, regress_clip=1.0, mesh=mesh
    )
    session.step(act)
    timestep = devices.device_put(session.timestep, mesh, devices.SHARDED)
    compiled = act.lower(session.state.params, session.memory, timestep).compile()
    for _ in range(LENGTH + 4):
        session.step(act)
    memory = session.memory
    where = {
        "replay": memory.replay.experience.frame.sharding.shard_shape(
            memory.replay.experience.frame.shape
        ),
        "stack": memory.actor.stack.sharding.shard_shape(memory.actor.stack.shape),
    }
    kept = memory.replay.experience._replace(frame=None)
    left = {"replay": kept, "regression": memory.regression, "where": where}
    return jax.device_get(left), collectives(compiled), act._cache_size()


class StopOnce:
    """Asks a stage to stop at the n-th question."""

    def __init__(self, count):
        self._left = count

    def check(self):
        self._left -= 1
        if self._left == 0:
            raise interrupts.Interrupted("stopped")


def stages_on_two(folder, *, is_stopped):
    """Pretrains and fine-tunes on the chain on two devices, stopped once or not at all.

    Pretraining goes on on two devices, fine-tuning on one.
    """
    options = {
        "game": "Chain",
        "pretrain_frames": 4 * 160,
        "replay_size": 160,
        "warmup_agent_steps": 60,
        "report_agent_steps": 80,
        "checkpoint_agent_steps": 1000,
        "finetune_agent_steps": 120,
        "infer_agent_steps": 60,
        "infer_episodes": 1000,
        "evaluations": 1,
    }
    config = config_lib.replace_options(config_lib.preset_config("smoke"), **options)
    pretrain = functools.partial(
        stages.pretrain, workdir=folder / "pretrain", constructor=fakes.ChainPool
    )
    finetune = functools.partial(
        stages.finetune,
        workdir=folder / "finetune",
        init=folder / "pretrain",
        constructor=fakes.ChainPool,
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
        left, facts[f"pretrain_{count}"] = learned(count, is_pretraining=True)
        np.savez(folder / f"pretrain_{count}.npz", **flat(left))
    for count in (1, 8):
        left, facts[f"finetune_{count}"] = learned(count, is_pretraining=False)
        np.savez(folder / f"finetune_{count}.npz", **flat(left))
        left, facts[f"act_{count}"], facts[f"traces_{count}"] = acted(count)
        facts[f"where_{count}"] = left.pop("where")
        np.savez(folder / f"act_{count}.npz", **flat(left))
    state = AGENT.init(jax.random.key(0))
    facts["num_params"] = sum(
        x.size
        for name in ("features", "successor")
        for x in jax.tree.leaves(state.params[name])
    )
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    {"steps": leave_steps, "stages": leave_stages}[sys.argv[2]](
        pathlib.Path(sys.argv[1])
    )
