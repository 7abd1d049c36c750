"""Estimates the memory and disk that a run needs, and reads what the machine offers."""

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
from absl import logging

# Networks, optimiser, activations and libraries: no run needs less. Measured with the
# smallest encoder.
_BASE_BYTES = 700 * 2**20
# The share of free memory that a run may take.
_USABLE = 0.9
# Compression of the replay on disk, at most. (Random play of Pong reaches 180.)
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
    """Returns the free memory of the first device, of the host if that is a CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return host_bytes()


def host_bytes(root: pathlib.Path = _ROOT) -> int:
    """Returns the free memory: the host's, or less if a control group limits it.

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
    """Returns how many cores this process may use, by its affinity and its quota.

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


def replay_bytes(*, num_envs: int, size: int, bytes_per_step: int) -> int:
    """Returns the bytes of a replay.

    Args:
      num_envs: Environments that add a step together.
      size: Agent steps held; rounded down to a multiple of `num_envs`.
      bytes_per_step: Bytes of one step of one environment.
    """
    return size // num_envs * num_envs * bytes_per_step


def needed_bytes(
    replay_bytes: int, *, num_devices: int, is_copied: bool, num_seeds: int = 1
) -> int:
    """Estimates the memory that a stage needs: of each device, or of the host.

    All devices of a CPU share the host's memory, and each of several processes has its
    part. With several seeds at once, one replay is there twice while it is taken out for
    a checkpoint.

    Args:
      replay_bytes: Of one seed, over all devices.
      num_devices: Devices that share the replay.
      is_copied: Whether checkpoints hold the replay, which copies it on the host.
      num_seeds: Seeds at once.
    """
    there = replay_bytes * (num_seeds + (num_seeds > 1))
    if jax.default_backend() != "cpu":
        return there // num_devices + _BASE_BYTES
    copied = num_seeds * replay_bytes if is_copied else 0
    return (there + copied) // jax.process_count() + _BASE_BYTES


def cache_folder(
    warn: Callable[[str], None] = logging.warning,
) -> pathlib.Path | None:
    """Returns the user's cache folder for this version of JAX and this kind of CPU.

    It lies in `$XDG_CACHE_HOME/aps_jax` (by default `~/.cache/aps_jax`). Where there is no
    home folder, as in some containers, it warns and returns None.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:
        warn("this user has no home folder: compiled programs are not cached.")
        return None
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
    replay_bytes: int,
    *,
    num_devices: int,
    is_copied: bool,
    option: str,
    num_seeds: int = 1,
) -> None:
    """Checks that the replay fits into memory, or those of several seeds at once.

    Args:
      replay_bytes: As in `needed_bytes`.
      num_devices: As there.
      is_copied: As there.
      option: The flag that sets the size of the replay, for the message.
      num_seeds: As there.

    Raises:
      ValueError: It does not fit, with the estimate and what is free.
    """
    needed = needed_bytes(
        replay_bytes,
        num_devices=num_devices,
        is_copied=is_copied,
        num_seeds=num_seeds,
    )
    free = available_bytes()
    whose = "The replay needs"
    if num_seeds > 1:
        whose = f"The replays of {num_seeds} seeds need"
        option = f"num_seeds or --{option}"
    if needed > _USABLE * free:
        raise ValueError(
            f"{whose} about {size_text(needed)} with what goes with it, and "
            f"{size_text(free)} of memory are free: give a smaller --{option}, or "
            "--nocheckpoint_replay, which saves its copy."
        )
    if jax.default_backend() == "cpu" or not is_copied:
        return
    needed = num_seeds * replay_bytes // jax.process_count() + _BASE_BYTES
    free = host_bytes()
    if needed > _USABLE * free:
        raise ValueError(
            f"Checkpoints copy the replay to the host, which needs about "
            f"{size_text(needed)}, and {size_text(free)} of its memory are free: give "
            f"--nocheckpoint_replay or a smaller --{option}."
        )


def check_cores(env_threads: int, warn: Callable[[str], None]) -> None:
    """Warns if there are more emulator threads than cores in the control group.

    Args:
      env_threads: Threads that step the emulators; 0 for one per core of the affinity.
      warn: Called with the sentence.
    """
    cores, threads = usable_cores(), env_threads
    if hasattr(os, "sched_getaffinity"):
        threads = threads or len(os.sched_getaffinity(0))
    if threads > math.ceil(cores):
        warn(
            f"{threads} emulator threads share {cores:g} cores, the quota of this "
            f"process: give --env_threads={math.ceil(cores)}."
        )


def check_writable(workdir: str | os.PathLike[str]) -> None:
    """Checks that a folder can be written, by writing to it.

    Raises:
      ValueError: It cannot, with the reason.
    """
    path = pathlib.Path(workdir, f"probe_{os.getpid()}")
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
    workdir: str | os.PathLike[str],
    *,
    fixed_bytes: int,
    replay_bytes: int,
    kept: int,
    warn: Callable[[str], None],
) -> None:
    """Checks that a folder can be written and has room for the checkpoints.

    Args:
      workdir: The run's folder.
      fixed_bytes: Bytes of a checkpoint without the replay.
      replay_bytes: Bytes of its replay; 0 if it is not saved.
      kept: Checkpoints that stay on disk while one more is written.
      warn: Called with a sentence if there may be too little room.

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
