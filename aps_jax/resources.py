"""What a run will take, and what this machine has: told before heavy work starts."""

import os
import pathlib

import jax

from aps_jax import config as config_lib
from aps_jax import replay

# Networks, optimiser, activations and the libraries themselves: a floor, measured with
# the smallest encoder, that no run goes under.
_BASE_BYTES = 700 * 2**20
# Of the memory there is, some is left to the rest of the system.
_USABLE = 0.9


def available_bytes() -> int:
    """Returns the memory of the first device; of the host if that is a CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return _host_bytes()


def _host_bytes() -> int:
    """Returns what the host's memory and the process's control group leave free."""
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():  # Counts the page cache, which the kernel gives back.
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = [int(line.split()[1]) * 1024]
    for limit_name, usage_name in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, usage = pathlib.Path(limit_name), pathlib.Path(usage_name)
        if limit.exists() and usage.exists() and limit.read_text().strip() != "max":
            free.append(int(limit.read_text()) - int(usage.read_text()))
    return min(free)


def replay_bytes(config: config_lib.Config, *, is_pretraining: bool) -> int:
    """Returns the bytes of the replay of one stage, counted from its shapes."""
    if is_pretraining:
        num_envs, size = config.pretrain.num_envs, config.pretrain.replay_size
    else:
        num_envs = config.finetune.finetune_num_envs
        size = config.finetune.finetune_agent_steps + num_envs
    return replay.make_replay(
        num_envs=num_envs, size=size, feature_dim=config.learner.feature_dim
    ).num_bytes


def needed_bytes(config: config_lib.Config, *, is_pretraining: bool) -> int:
    """Returns about what a stage takes: its replay and what goes with any run."""
    return replay_bytes(config, is_pretraining=is_pretraining) + _BASE_BYTES


def check_memory(config: config_lib.Config, *, is_pretraining: bool) -> None:
    """Checks that a stage's replay can fit.

    Raises:
      ValueError: It cannot, with the estimate and what there is.
    """
    needed = needed_bytes(config, is_pretraining=is_pretraining)
    there = available_bytes()
    if needed > _USABLE * there:
        name = "replay_size" if is_pretraining else "finetune_agent_steps"
        raise ValueError(
            f"The replay needs about {needed / 2**30:.1f} GiB with what goes with it, "
            f"and {there / 2**30:.1f} GiB of memory are free: give a smaller --{name}."
        )


def check_accelerator() -> None:
    """Checks that JAX sees a GPU or TPU.

    Raises:
      ValueError: It sees CPUs alone.
    """
    if jax.default_backend() == "cpu":
        raise ValueError(
            "--require_accelerator was given, but JAX sees no GPU or TPU, only "
            f"{jax.devices()[0].device_kind!r}: install jax[cuda13] or jax[tpu], or "
            "leave the flag out."
        )
