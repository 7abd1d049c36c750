"""Estimates the memory and disk that a run needs, and reads what the machine offers."""

import ctypes
import hashlib
import math
import mmap
import os
import pathlib
import platform
import shutil
import tempfile
from collections.abc import Callable

import jax
from absl import logging

Warn = Callable[[str], None]

# Networks, optimiser, activations and libraries: no run needs less. Measured with the
# smallest encoder.
_BASE_BYTES = 700 * 2**20
_USABLE = 0.9  # share of the free memory that a run may take
_MOST_COMPRESSED = 1000  # of the replay on disk; random play of Pong reaches 180
_ROOT = pathlib.Path("/")
# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
# What the heap is grown to: temporaries of the largest update, and no replay. (APS's
# own encoder with 512 particles takes 0.6 GB.)
_GROWN_BYTES = 2**30
# Free memory that stays with the process: the heap's end must not be given back at
# once. The largest that mallopt takes.
_KEPT_BYTES = 2**31 - 1


def available_bytes() -> int:
    """Returns the free memory of the first device, of the host if that is a CPU."""
    device = jax.local_devices()[0]
    stats = (device.platform != "cpu" and device.memory_stats()) or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return host_bytes()


def host_bytes(root: pathlib.Path = _ROOT) -> int:
    """Returns the free memory: the host's, or less if a control group limits it.

    Below `root` are `proc` and `sys`; so it is for the functions that follow.
    """
    # Counts the page cache, which the kernel gives back.
    found = _field(root / "proc/meminfo", "MemAvailable")
    if found:
        free = [int(found.split()[0]) * 1024]
    else:
        free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    for controller, limit_name, usage_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for group in _control_groups(controller, root):
            limit, usage = _numbers(group / limit_name), _numbers(group / usage_name)
            if limit and usage:
                free.append(max(limit[0] - usage[0], 0))
    return min(free)


def usable_cores(root: pathlib.Path = _ROOT) -> float:
    """Returns how many cores this process may use, by its affinity and its quota."""
    cores = [float(len(os.sched_getaffinity(0)))]
    for group in _control_groups("", root):
        if len(numbers := _numbers(group / "cpu.max")) == 2:
            cores.append(numbers[0] / numbers[1])
    for group in _control_groups("cpu", root):
        quota = _numbers(group / "cpu.cfs_quota_us")
        period = _numbers(group / "cpu.cfs_period_us")
        if quota and period and quota[0] > 0:
            cores.append(quota[0] / period[0])
    return min(cores)


def _control_groups(controller: str, root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of this process's group and of those around it.

    Version 1 of control groups has a tree per controller; version 2 has one, and the
    name of its controller is empty.
    """
    mount = root / "sys/fs/cgroup" / controller
    own = "/"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            own = path
    # Within a container the path may be the host's, and the mount its own group.
    inner = pathlib.PurePosixPath(own.lstrip("/"))
    places = [mount / part for part in (inner, *inner.parents)]
    return [place for place in places if place.is_dir()]


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(path: pathlib.Path) -> list[int]:
    """Returns the whole numbers in a file; none where it says `max` or is missing."""
    words = _read(path).split()
    return [int(word) for word in words] if "max" not in words else []


def _field(path: pathlib.Path, *names: str) -> str:
    """Returns the first value of a name in a file of `name: value`, or nothing."""
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def cpu_fact(*names: str) -> str:
    """Returns what the kernel says of the CPU under one of some names, or nothing."""
    return _field(_ROOT / "proc/cpuinfo", *names)


def needed_bytes(
    replay_bytes: int, *, num_devices: int, is_copied: bool, num_seeds: int = 1
) -> int:
    """Estimates the memory that a stage needs: of each device, or of the host.

    All devices of a CPU share the host's memory, and each of several processes has its
    part. With several seeds at once, one replay is there twice while it is taken out
    for a checkpoint.

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


def cache_folder(warn: Warn = logging.warning) -> pathlib.Path | None:
    """Returns the user's cache folder for this version of JAX and this kind of CPU.

    It lies in `$XDG_CACHE_HOME/aps_jax`, by default `~/.cache/aps_jax`. Where there is
    no home folder, as in some containers, it warns and returns None.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    except RuntimeError:
        warn("this user has no home folder: compiled programs are not cached.")
        return None
    features = cpu_fact("flags", "Features")  # The latter on ARM.
    kind = f"{platform.machine()} {jax.__version__} {features}"
    digest = hashlib.sha256(kind.encode()).hexdigest()[:12]
    return pathlib.Path(root, "aps_jax", digest)


def check_memory(
    replay_bytes: int,
    *,
    num_devices: int,
    is_copied: bool,
    option: str,
    num_seeds: int = 1,
) -> None:
    """Checks that what a stage needs fits into memory.

    The arguments are those of `needed_bytes`, and `option`, the flag that sets the size
    of the replay, for the message.

    Raises:
      ValueError: It does not fit, with the estimate and what is free.
    """
    needed = needed_bytes(
        replay_bytes, num_devices=num_devices, is_copied=is_copied, num_seeds=num_seeds
    )
    free, whose = available_bytes(), "The replay needs"
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


def check_cores(env_threads: int, warn: Warn) -> None:
    """Warns if there are more emulator threads than cores in the control group.

    With 0 threads there is one for each core of the affinity.
    """
    cores, threads = usable_cores(), env_threads or len(os.sched_getaffinity(0))
    if threads > math.ceil(cores):
        warn(
            f"{threads} emulator threads share {cores:g} cores, the quota of this "
            f"process: give --env_threads={math.ceil(cores)}."
        )


def check_writable(workdir: str | os.PathLike[str]) -> None:
    """Raises a `ValueError` with the reason if a folder cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=workdir, prefix="probe_") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"Cannot write to {workdir}: {error.strerror}.") from error


def check_disk(
    workdir: str | os.PathLike[str],
    *,
    fixed_bytes: int,
    replay_bytes: int,
    kept: int,
    warn: Warn,
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
    least = fixed_bytes + replay_bytes // _MOST_COMPRESSED
    most = (kept + 1) * (fixed_bytes + replay_bytes)
    there = f"{size_text(free)} are free at {workdir}"
    advice = (
        "free some, or give another --workdir, fewer --keep_checkpoints or "
        "--nocheckpoint_replay."
    )
    if free < least:
        needed = f"A checkpoint takes at least {size_text(least)}"
        raise ValueError(f"{needed}, and {there}: {advice}")
    if free < most:
        warn(
            f"{there}, and {kept + 1} checkpoints take up to {size_text(most)} "
            f"(frames compress, most games several times): {advice}"
        )


def size_text(num_bytes: float) -> str:
    """Writes a number of bytes for people."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def tune_allocator() -> None:
    """Makes glibc's allocator keep what an update frees, on huge pages, in one arena.

    XLA's CPU client allocates an update's temporaries anew each time. Glibc asks the
    kernel for blocks that large and gives them back, and each of their pages is zeroed
    when it is first touched: a quarter of an update's processor time
    (docs/performance.md). Blocks of the heap stay, but only the first arena has a heap
    that holds more than 64 MiB, and which arena a thread gets is chance. The heap grows
    by a GiB here, on huge pages where there are any; that takes no memory before it is
    touched.

    Threads that come and go write checkpoints, and each keeps free pieces in its arena:
    with many arenas memory grew by 1 MB per checkpoint (docs/reliability.md).

    To be called before there are threads. Other allocators have no such settings, nor
    need them. The library leaves the choice to its user; all scripts call it.
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
    """Raises a `ValueError` if JAX sees CPUs alone."""
    if jax.default_backend() == "cpu":
        raise ValueError(
            "--require_accelerator was given, but JAX sees no GPU or TPU, only "
            f"{jax.devices()[0].device_kind!r}: install jax[cuda13] or jax[tpu], or "
            "leave the flag out."
        )
