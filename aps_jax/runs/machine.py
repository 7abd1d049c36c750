"""What a run will take, and what this machine has: told before heavy work starts."""

import contextlib
import ctypes
import hashlib
import math
import mmap
import os
import pathlib
import platform
import shutil
from collections.abc import Callable

import jax

from aps_jax import config as config_lib
from aps_jax.parallel import processes
from aps_jax.replay import buffer

# Networks, optimiser, activations and the libraries themselves: a floor, measured with
# the smallest encoder, that no run goes under.
_BASE_BYTES = 700 * 2**20
# Of the memory there is, some is left to the rest of the system.
_USABLE = 0.9
# How much smaller the replay can be on disk, at most: a floor for refusing a start.
# (Random play of Pong is 180 times smaller.)
_MOST_COMPRESSED = 1000
_ROOT = pathlib.Path("/")
# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# What the heap is grown to: temporaries of the largest update, and no replay. (APS's own
# encoder with 512 particles takes 0.6 GB.)
_GROWN_BYTES = 2**30
# Free memory that stays with the process: the heap's end must not be given back at once.
# The largest that mallopt takes.
_KEPT_BYTES = 2**31 - 1


def available_bytes() -> int:
    """Returns the memory of the first device; of the host if that is a CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return host_bytes()


def host_bytes(root: pathlib.Path = _ROOT) -> int:
    """Returns what the host's memory and the process's control groups leave free.

    Args:
      root: Where `proc` and `sys` are.
    """
    free = []
    meminfo = root / "proc/meminfo"
    if meminfo.exists():  # Counts the page cache, which the kernel gives back.
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    else:
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))
    for controller, limit_name, usage_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in _control_groups(controller, root):
            limit, usage = _number(group / limit_name), _number(group / usage_name)
            if limit is not None and usage is not None:
                free.append(max(int(limit - usage), 0))
    return min(free)


def usable_cores(root: pathlib.Path = _ROOT) -> float:
    """Returns the cores that this process may use: its affinity and its quota.

    Args:
      root: Where `proc` and `sys` are.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = [float(len(os.sched_getaffinity(0)))]
    else:
        cores = [float(os.cpu_count() or 1)]
    for group in _control_groups("", root):
        words = _read(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            cores.append(int(words[0]) / int(words[1]))
    for group in _control_groups("cpu", root):
        quota = _number(group / "cpu.cfs_quota_us")
        period = _number(group / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            cores.append(quota / period)
    return min(cores)


def _control_groups(controller: str, root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of this process's group and of those around it.

    Args:
      controller: Of version 1 of control groups; empty for version 2.
      root: Where `proc` and `sys` are.
    """
    mount = root / "sys/fs/cgroup" / controller
    own = "/"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            own = path
    # Within a container the path may be the host's, and the mount its own group.
    places = [mount, *(mount / part for part in _prefixes(own))]
    return [place for place in places if place.is_dir()]


def _prefixes(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: pathlib.Path) -> float | None:
    text = _read(path).strip()
    return float(text) if text.lstrip("-").isdigit() else None


def replay_bytes(config: config_lib.Config, *, is_pretraining: bool) -> int:
    """Returns the bytes of the replay of one stage, counted from its shapes."""
    if is_pretraining:
        num_envs, size = config.pretrain.num_envs, config.pretrain.replay_size
    else:
        num_envs = config.finetune.finetune_num_envs
        size = config.finetune.finetune_agent_steps + num_envs
    return buffer.make_replay(
        num_envs=num_envs, size=size, feature_dim=config.learner.feature_dim
    ).num_bytes


def needed_bytes(
    config: config_lib.Config, *, is_pretraining: bool, num_seeds: int = 1
) -> int:
    """Returns the memory that a stage needs, about: of each device, or of the host.

    Several devices of a CPU are all in the host's memory; of several processes each has
    its share. Of many seeds at once the replay of one is there twice while it is taken
    out for its checkpoint.
    """
    ring = replay_bytes(config, is_pretraining=is_pretraining)
    there = num_seeds * ring + (ring if num_seeds > 1 else 0)
    if jax.default_backend() != "cpu":
        return there // config.num_devices + _BASE_BYTES
    # One copy more while a checkpoint is written.
    copied = num_seeds * ring if config.report.checkpoint_replay else 0
    return (there + copied) // processes.num_processes() + _BASE_BYTES


def cache_folder() -> pathlib.Path:
    """Returns the user's folder for what can be made again on this kind of machine.

    `$XDG_CACHE_HOME/aps_jax` (`~/.cache/aps_jax`), and in it a folder for this version of
    JAX and this CPU's instructions.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    kind = f"{platform.machine()} {jax.__version__} {_cpu_flags()}"
    digest = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return pathlib.Path(root, "aps_jax", digest)


def _cpu_flags() -> str:
    """Returns what the CPU can do, in the kernel's words; empty where it does not say."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.split(":", 1)[1].strip()
    return ""


def check_memory(
    config: config_lib.Config, *, is_pretraining: bool, num_seeds: int = 1
) -> None:
    """Checks that a stage's replay can fit, or those of many seeds at once.

    Raises:
      ValueError: It cannot, with the estimate and what there is.
    """
    needed = needed_bytes(config, is_pretraining=is_pretraining, num_seeds=num_seeds)
    there = available_bytes()
    name = "replay_size" if is_pretraining else "finetune_agent_steps"
    whose = "The replay needs"
    if num_seeds > 1:
        whose, name = f"The replays of {num_seeds} seeds need", f"num_seeds or --{name}"
    if needed > _USABLE * there:
        raise ValueError(
            f"{whose} about {size_text(needed)} with what goes with it, and "
            f"{size_text(there)} of memory are free: give a smaller --{name}, or "
            "--nocheckpoint_replay, which saves its copy."
        )
    if jax.default_backend() == "cpu" or not config.report.checkpoint_replay:
        return
    ring = replay_bytes(config, is_pretraining=is_pretraining)
    needed = num_seeds * ring // processes.num_processes() + _BASE_BYTES
    there = host_bytes()
    if needed > _USABLE * there:
        raise ValueError(
            f"Checkpoints copy the replay to the host, which needs about "
            f"{size_text(needed)}, and {size_text(there)} of its memory are free: give "
            f"--nocheckpoint_replay or a smaller --{name}."
        )


def check_cores(config: config_lib.Config, warn: Callable[[str], None]) -> None:
    """Warns of emulator threads that the control group has no cores for."""
    cores, threads = usable_cores(), config.environment.env_threads
    if hasattr(os, "sched_getaffinity"):
        threads = threads or len(os.sched_getaffinity(0))
    if threads > math.ceil(cores):
        warn(
            f"{threads} emulator threads share {cores:g} cores, the quota of this "
            f"process: give --env_threads={math.ceil(cores)}."
        )


def check_writable(workdir: pathlib.Path) -> None:
    """Checks that a folder can be written, by writing to it.

    Raises:
      ValueError: It cannot, with the reason.
    """
    path = workdir / f"probe_{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"Cannot write to {workdir}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def check_disk(
    workdir: pathlib.Path,
    *,
    fixed_bytes: int,
    replay_bytes: int,
    kept: int,
    warn: Callable[[str], None],
) -> None:
    """Checks that a folder can be written and has room for the checkpoints.

    Args:
      workdir: The run's folder.
      fixed_bytes: Arrays of a checkpoint but for the replay.
      replay_bytes: Its replay; 0 where it is not saved.
      kept: Checkpoints that stay on disk while one more is written.
      warn: Is told if there may be too little room.

    Raises:
      ValueError: It cannot be written, or not even one checkpoint can fit.
    """
    check_writable(workdir)
    free = shutil.disk_usage(workdir).free
    advice = (
        "free some, or give another --workdir, fewer --keep_checkpoints or "
        "--nocheckpoint_replay."
    )
    least = fixed_bytes + replay_bytes // _MOST_COMPRESSED
    most = (kept + 1) * (fixed_bytes + replay_bytes)
    if free < least:
        raise ValueError(
            f"A checkpoint takes at least {size_text(least)}, and {size_text(free)} are free "
            f"at {workdir}: {advice}"
        )
    if free < most:
        warn(
            f"{size_text(free)} are free at {workdir}, and {kept + 1} checkpoints take up "
            f"to {size_text(most)} (frames compress, most games several times): {advice}"
        )


def size_text(num_bytes: int) -> str:
    """Writes a number of bytes for people."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def tune_allocator() -> None:
    """Makes glibc's allocator keep what an update frees, on huge pages, in one arena.

    XLA's CPU client allocates an update's temporaries anew each time. Blocks that large
    glibc asks of the kernel and gives back, and each of their pages is zeroed when it is
    first touched: a quarter of an update's processor time (docs/performance.md). Blocks
    of the heap stay there, but only the first arena has a heap that holds more than
    64 MiB; which arena a thread gets is chance. It grows by a GiB here, which takes no
    memory before it is touched, and then huge pages where the kernel has any.

    Checkpoints are written by threads that come and go. Each keeps free pieces in the
    arena it happened to get: with many arenas memory grew by 1 MB per checkpoint
    (docs/reliability.md).

    To be called before there are threads; other allocators have no such settings, nor
    need them. The library leaves the choice to its user, the scripts all call it.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(_GROWN_BYTES))
    if block is None:  # The process may not have as much; its heap grows as it did.
        return
    libc.free(ctypes.c_void_p(block))
    start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    length = ctypes.c_size_t(_GROWN_BYTES - mmap.PAGESIZE)
    # Where the kernel has no huge pages it says so, and nothing is lost.
    libc.madvise(ctypes.c_void_p(start), length, mmap.MADV_HUGEPAGE)


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
