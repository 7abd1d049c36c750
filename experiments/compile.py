r"""Compiles a run's programs for a GPU or TPU that is only described, and weighs them.

  python -m experiments.compile --platform=cuda --topology=h100 --preset=gpu
  python -m experiments.compile --platform=tpu --topology=v5e:2x2 --num_devices=4 \
    --agent=aps --preset=gpu

No such device is needed and nothing is run: the table says whether acting, the update
and (for worlds) the loop on the device compile, what they need, and the least time that
this allows (docs/devices.md). The compilers are extras: aps_jax[cuda], aps_jax[tpu].
"""

import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from aps_jax import config as config_lib
from aps_jax import types
from aps_jax.envs import games, worlds
from aps_jax.parallel import devices
from aps_jax.report import tables
from aps_jax.train import loop, preflight
from experiments import common_flags

_PLATFORM = flags.DEFINE_enum(
    "platform", "cuda", ["cuda", "tpu"], "For which kind of device to compile."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "h100",
    "The device: h100 or h200, with :N for N of them; or a slice of TPUs such as "
    "v5e:2x2, v5p:2x2x1 or v6e:2x2. The programs use the first --num_devices of it.",
)


class Device(NamedTuple):
    """A device as its vendor describes it, per chip and in one direction of a link."""

    name: str
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes/s
    half: float  # operations/s of matrix products in bfloat16
    single: float  # and of float32 as JAX multiplies it by default there
    link: float  # bytes/s to other chips
    launch: float  # seconds that each kernel takes at least


# NVIDIA's data sheets (without sparsity; float32 as TF32) and Google Cloud's pages of
# TPU versions, where float32 is multiplied in one pass of bfloat16. A kernel's launch
# from a queue that is full is taken as 2 us on a GPU; a TPU runs one program.
DEVICES = {
    "h100": Device("NVIDIA H100", 80e9, 3.35e12, 989e12, 495e12, 450e9, 2e-6),
    "h200": Device("NVIDIA H200", 141e9, 4.8e12, 989e12, 495e12, 450e9, 2e-6),
    "v5e": Device("TPU v5e", 16e9, 0.82e12, 197e12, 197e12, 100e9, 0.0),
    "v5p": Device("TPU v5p", 95e9, 2.77e12, 459e12, 459e12, 300e9, 0.0),
    "v6e": Device("TPU v6e", 32e9, 1.64e12, 918e12, 918e12, 224e9, 0.0),
}

# What XLA asks of a Hopper GPU, as `nvidia-smi` and CUDA report it of one.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def main(argv: Sequence[str]) -> None:
    """Compiles what the flags describe, and prints the table."""
    common_flags.reject_words(argv)
    # The compilers are plugins, of which none may look for a device of its own.
    jax.config.update("jax_platforms", "cpu")
    config = common_flags.config_from_flags()
    device, there = describe(_PLATFORM.value, _TOPOLOGY.value)
    if config.num_devices > len(there):
        raise ValueError(
            f"--num_devices is {config.num_devices}, and {_TOPOLOGY.value} has "
            f"{len(there)} devices."
        )
    found: list[tuple[Program, Weight | str]] = []
    for program in programs(config, there[: config.num_devices]):
        try:
            weight = weigh(
                program, device, _PLATFORM.value, is_half=config.learner.bfloat16
            )
            found.append((program, weight))
        except jax.errors.JaxRuntimeError as error:
            found.append((program, str(error).splitlines()[0]))
    tables.show_tables([_table(config, device, found)])


def describe(platform: str, topology: str) -> tuple[Device, list[Any]]:
    """Returns a device's figures, and the described devices.

    Raises:
      ValueError: The topology is unknown, or the platform's compiler is not installed.
    """
    kind, _, shape = topology.partition(":")
    known = [name for name in DEVICES if (name[0] == "h") == (platform == "cuda")]
    if kind not in known:
        raise ValueError(
            f"--topology must begin with one of {', '.join(known)} for "
            f"--platform={platform}, got {topology!r}."
        )
    plugin = {"cuda": "jax_plugins.xla_cuda13", "tpu": "libtpu"}[platform]
    package = plugin.partition(".")[0]
    if not (importlib.util.find_spec(package) and importlib.util.find_spec(plugin)):
        raise ValueError(
            f"--platform={platform} needs its compiler: "
            f"pip install 'aps_jax[{platform}]'."
        )
    device = DEVICES[kind]
    options: dict[str, Any] = {"topology_name": topology}
    if platform == "cuda":
        if not (shape or "1").isdecimal():
            raise ValueError(
                f"--topology must be {kind} or {kind}:N, got {topology!r}."
            )
        options = {
            "topology_name": kind,
            "topology": f"1x1x{shape or 1}",
            "target_config": _HOPPER.format(**device._asdict()),
        }
    else:  # libtpu aborts at the flags of other platforms.
        os.environ.pop("XLA_FLAGS", None)
    # Else libtpu looks for the machine that it is on, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        found = topologies.get_topology_desc(platform=platform, **options)
    except Exception as error:  # The plugins raise what they like.
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={topology} is refused: {reason}.") from error
    return device, list(found.devices)


class Program(NamedTuple):
    """A jitted function, and the shapes of its arguments on the described devices."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    per_step: float  # calls per agent step of one environment; 0 where not known
    whole: Any  # the same for one device and not jitted, whose operations are counted


def programs(config: config_lib.Config, there: Sequence[Any]) -> Iterator[Program]:
    """Yields the programs of a run's first stage, as the loop makes them."""
    world = worlds.make(config.game) if games.is_world(config.game) else None
    num_actions = world.num_actions if world else preflight.MOST_ACTIONS
    agent = config.make_agent(num_actions, config.observation)
    make_plan = loop.pretrain_plan if config.has_pretraining else loop.finetune_plan
    plan = make_plan(config, agent)
    policy, learner = plan.phase
    mesh = None
    if len(there) > 1:
        axis_types = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.Mesh(np.array(there), (devices.AXIS,), axis_types)
    replicated, sharded = devices.REPLICATED, devices.SHARDED

    def on(tree: Any, specs: Any = replicated) -> Any:
        if mesh is None:
            where = SingleDeviceSharding(there[0])
            return jax.tree.map(lambda x: _shape(x, where), tree)
        wanted = devices.shardings(mesh, specs)
        return jax.tree.map(
            lambda where, part: jax.tree.map(lambda x: _shape(x, where), part),
            wanted,
            tree,
        )

    state = jax.eval_shape(agent.init, jax.random.key(0))
    init_rollout = functools.partial(
        loop.init_rollout,
        policy,
        num_envs=plan.num_envs,
        replay_size=plan.replay_size,
        is_prioritised=learner.batch.priorities is not None,
    )
    rollout = jax.eval_shape(init_rollout, state)
    sums = jax.eval_shape(lambda: loop.init_sums(loop.names_of(learner.metrics)))
    timestep = _timestep(config, plan.num_envs)
    key = on(jax.eval_shape(jax.random.key, 0))
    args = on(state), on(rollout, loop.ROLLOUT_SPECS), on(timestep, sharded)
    draw = loop.make_draw(plan.phase, reward_free=plan.reward_free)
    whole_act, whole_learn = loop.make_act(policy), loop.make_learn(learner, draw)
    if mesh is not None:
        act = loop.jit_act(policy, mesh=mesh)
        learn = loop.jit_learn(plan.phase, reward_free=plan.reward_free, mesh=mesh)
    else:  # The loop's own wrappers would name this machine's device.
        act = jax.jit(whole_act, donate_argnums=2)
        learn = jax.jit(whole_learn, donate_argnums=(1, 2))
    yield Program("acting", act, (key, *args), 1 / plan.num_envs, whole_act)
    replay = on(rollout.replay, loop.REPLAY_SPECS)
    updates = plan.samples_per_step / learner.batch.num_samples
    arguments = key, on(state), on(sums), replay
    yield Program("update", learn, arguments, updates, whole_learn)
    if world is None or mesh is not None:
        return
    keys = jax.eval_shape(jax.vmap(jax.random.key), np.zeros(plan.num_envs, np.uint32))
    others = (sums, rollout, *jax.eval_shape(world.reset, keys))
    due = jax.ShapeDtypeStruct((loop.MOST_ITERATIONS,), np.int32)
    count = jax.ShapeDtypeStruct((), np.int32)
    run: Any = loop.make_run(world, act, learn)
    arguments = (key, key), *on((state, others, due, count))
    yield Program("loop", run, arguments, 0.0, run.__wrapped__)


def _shape(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _timestep(config: config_lib.Config, num_envs: int) -> types.TimeStep:
    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((num_envs, *shape), dtype)

    return types.TimeStep(
        frame=of(np.uint8, *config.observation.frame_shape),
        reward=of(np.float32),
        terminated=of(np.bool_),
        truncated=of(np.bool_),
        is_first=of(np.bool_),
        lives=of(np.int32),
        ram=of(np.uint8, 128),
    )


class Weight(NamedTuple):
    """What the compiler says of a program, on each device."""

    compile_seconds: float
    arguments: float  # bytes, of them those that the results take over
    temporaries: float  # bytes
    listed: "Listed"
    flops: float
    least_seconds: float


def weigh(program: Program, device: Device, platform: str, *, is_half: bool) -> Weight:
    """Compiles a program, and computes its least time on a device.

    Raises:
      jax.errors.JaxRuntimeError: It does not compile, such as for lack of memory.
    """
    started = time.monotonic()
    options = {"xla_gpu_autotune_level": 0} if platform == "cuda" else None
    lowered = program.function.lower(*program.arguments)
    compiled = lowered.compile(compiler_options=options)
    seconds = time.monotonic() - started
    listed = list_kernels(compiled.as_text())
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    if cost is not None:
        flops = cost["flops"]
    else:  # The CUDA compiler has none: that of the program as it was given.
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.arguments
        )
        traced = jax.jit(program.whole).trace(*shapes)
        given = traced.lower(lowering_platforms=(platform,)).cost_analysis()
        first, *_ = jax.tree.leaves(program.arguments)
        share = len(first.sharding.device_set)
        flops = given["flops"] / share
    rate = device.half if is_half else device.single
    busy = max(flops / rate, listed.moved / device.bandwidth)
    return Weight(
        compile_seconds=seconds,
        arguments=memory.argument_size_in_bytes
        + max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
        temporaries=memory.temp_size_in_bytes,
        listed=listed,
        flops=flops,
        least_seconds=busy
        + listed.collective_bytes / device.link
        + listed.kernels * device.launch,
    )


class Listed(NamedTuple):
    """What a compiled program's text lists."""

    kernels: int  # fusions, library calls and what else is launched by itself
    calls: dict[str, int]  # of libraries, by name
    collectives: int
    collective_bytes: float
    moved: float  # bytes read and written by the kernels


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(([^)]*)\)(.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+?\d+)\w*\[([\d,]*)\]({[^}]*})?")
_FAST_MEMORY = "S(1)"  # of a TPU, in an array's layout
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("conditional", "call", "iota", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "async-update"),
}
_COLLECTIVE = re.compile(
    "(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?$"
)
# Larger arrays are the replay: a program reads and writes some rows of it, which are
# counted on the other side.
_LARGEST = 2**28


def list_kernels(text: str) -> Listed:
    """Reads the text of a compiled program; a loop's body counts once."""
    fused = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    sizes: dict[str, float] = {}  # in the device's main memory
    calls: dict[str, int] = {}
    kernels = collectives = 0
    collective_bytes = moved = 0.0
    is_launched = False
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            is_launched = header[1] not in fused
            continue
        match = _INSTRUCTION.match(line)
        if not is_launched or match is None:
            continue
        name, kind, code, operands, rest = match.groups()
        sizes[name] = _num_bytes(kind)
        if code in _FREE or code.endswith("-done"):
            continue
        kernels += 1
        if _COLLECTIVE.match(code):
            collectives += 1
            collective_bytes += _num_bytes(kind, is_any_memory=True)
        if target := re.search(r'custom_call_target="([^"]+)"', rest):
            calls[target[1]] = calls.get(target[1], 0) + 1
        read = [sizes.get(x, 0.0) for x in re.findall(r"%([\w.\-]+)", operands)]
        moved += sum(x for x in (sizes[name], *read) if x <= _LARGEST)
    return Listed(kernels, calls, collectives, collective_bytes, moved)


def _num_bytes(kind: str, *, is_any_memory: bool = False) -> float:
    """Returns the bytes of a type in HLO, such as `(f32[2,3]{1,0}, pred[])`."""
    total = 0.0
    for name, shape, layout in _ARRAY.findall(kind):
        if is_any_memory or _FAST_MEMORY not in layout:
            bits = 8 if name == "pred" else int(re.sub(r"\D+", "", name))
            total += bits / 8 * math.prod(int(n) for n in shape.split(",") if n)
    return total


def _table(
    config: config_lib.Config,
    device: Device,
    found: Sequence[tuple[Program, Weight | str]],
) -> tables.Table:
    """Lays out what was found, and the frames per second that follow."""
    rows = []
    figures = (
        f"{device.name}: {device.memory / 1e9:.0f} GB, {device.bandwidth / 1e12:.2f} "
        f"TB/s, {device.half / 1e12:.0f} T operations/s in bfloat16."
    )
    notes = [f"{figures} Each of {config.num_devices} devices; nothing was run."]
    seconds = 0.0
    for program, one in found:
        if isinstance(one, str):
            notes.append(f"{program.name} DOES NOT COMPILE: {one}")
            seconds = math.inf
            continue
        listed, size = one.listed, one.arguments + one.temporaries
        rows.append(
            {
                "program": program.name,
                "compiled in": f"{one.compile_seconds:.0f} s",
                "arguments": f"{one.arguments / 1e9:.2f} GB",
                "temporaries": f"{one.temporaries / 1e9:.3f} GB",
                "fits": "yes" if size < device.memory else "NO",
                "kernels": f"{listed.kernels}",
                "collectives": (
                    f"{listed.collectives}, {listed.collective_bytes / 1e6:.1f} MB"
                ),
                "operations": f"{one.flops / 1e9:.1f} G",
                "moved": f"{listed.moved / 1e6:.0f} MB",
                "least time": f"{1e3 * one.least_seconds:.3f} ms",
            }
        )
        calls = ", ".join(f"{n} {name}" for name, n in listed.calls.items()) or "none"
        notes.append(f"Library calls of {program.name}: {calls}.")
        seconds += one.least_seconds * program.per_step
    if seconds < math.inf:
        notes.append(
            "As calculated, without the environments: at most "
            f"{config.observation.frame_skip / seconds:,.0f} frames/s."
        )
    title = f"{config.agent}, preset {config.preset}, {config.game}"
    return tables.make_table(title, rows or [{"program": "none"}], *notes)


if __name__ == "__main__":
    common_flags.run(main, short=("agent", "preset", "game"))
