"""Several processes of one run: how they connect, agree, and end together.

`jax.distributed` connects them and ends them when one is lost. A run of one process is
not connected: it is the primary process, and agrees with itself. *Collective* functions
must be called by all processes in the same order.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from aps_jax.parallel import interrupts

_T = TypeVar("_T")
_Error = TypeVar("_Error", bound=Exception)

# A process that has been silent for as long is taken for dead, and ends the others.
_HEARTBEAT_SECONDS = 30
_POLL_SECONDS = 1.0  # in which a busy primary asks whether the others shall stop
_SHARED_SECONDS = 60.0  # network file systems show new files late
_LINGER_SECONDS = 2.0  # in which the others report an error before the primary ends
_HINT = "The same commands on all hosts continue the run from its last checkpoint."

_host_names: list[str] = []  # of each process
_folder: pathlib.Path | None = None  # which all processes see
_is_alone = False  # the primary, within `broadcast_from_primary`
_next_poll = 0.0


def distributed_arguments(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> dict[str, Any] | None:
    """Chooses the arguments of `jax.distributed.initialize`; None for one process.

    Without any value, the tasks of a Slurm step are the processes of one run. JAX would
    then show each task one GPU, also the only task of a node; here the tasks share what
    `CUDA_VISIBLE_DEVICES` of `environment` names, unless Slurm has done so.

    Raises:
      ValueError: One of the three is missing, or the address is not `HOST:PORT`.
    """
    if num_processes == 1 and process_id in (None, 0):
        return None
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if any(value is not None for value in given.values()):
        if None in given.values():
            raise ValueError(
                "A run over several hosts needs all of --coordinator_address, "
                "--num_processes and --process_id, on Slurm none of them."
            )
        host, _, port = (coordinator_address or "").rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(
                "--coordinator_address must be HOST:PORT of process 0, got "
                f"{coordinator_address!r}."
            )
        return {**given, "cluster_detection_method": "deactivate"}
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1:
        return None
    num_local = math.ceil(num_tasks / int(environment.get("SLURM_STEP_NUM_NODES", "1")))
    gpus = environment.get("CUDA_VISIBLE_DEVICES")
    num_gpus = gpus.count(",") + 1 if gpus else 0
    share, rank = num_gpus // num_local, int(environment.get("SLURM_LOCALID", "0"))
    ids: list[int] | None = list(range(rank * share, (rank + 1) * share))
    if num_local == 1 or 0 < num_gpus < num_local:
        ids = []  # all that are visible
    elif not num_gpus:
        ids = None  # JAX's choice
    return {
        "num_processes": num_tasks,
        "cluster_detection_method": "slurm",
        "local_device_ids": ids,
    }


def connect(
    arguments: Mapping[str, Any], same: Mapping[str, Any], *, timeout_seconds: int = 300
) -> None:
    """Connects this process to the others, before JAX computes anything. Collective.

    Args:
      arguments: From `distributed_arguments`.
      same: JSON values that must be equal in all processes, by name.
      timeout_seconds: How long to wait for the others, before JAX aborts the process.

    Raises:
      ValueError: The processes cannot connect or do not fit together.
    """
    place = arguments.get("coordinator_address", "the address that Slurm gives")
    _print_if_killed(
        f"error: not all processes of this run came to {place} within "
        f"{timeout_seconds} s. Was each of them started, is that port of process 0 "
        "free, and does the network let it through?"
    )
    # It would take SIGTERM, for which `interrupts` listens.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        _print_if_killed(None)
        raise ValueError(
            f"Cannot connect to the other processes at {place}: {error}. Is the port "
            "in use?"
        ) from error
    _print_if_killed(f"error: process {jax.process_index()} lost the others. {_HINT}")
    num_devices = np.bincount([device.process_index for device in jax.devices()])
    if len(set(num_devices)) > 1:
        raise _agreed(
            ValueError(f"All processes need as many devices, and have {num_devices}.")
        )
    # The first collective: to later ones a process may come as late as it likes.
    _host_names[:] = all_gather(platform.node())
    wanted, *others = all_gather(dict(same))
    differences = [
        f"{name} is {other.get(name)!r} in {process_name(index)} and "
        f"{wanted.get(name)!r} in {process_name(0)}"
        for index, other in enumerate(others, start=1)
        for name in sorted(set(wanted) | set(other))
        if other.get(name) != wanted.get(name)
    ]
    if differences:
        raise _agreed(ValueError(f"Not the same everywhere: {'; '.join(differences)}."))


def num_processes() -> int:
    """Returns how many processes the run has."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Returns whether this is process 0, which writes and speaks for all."""
    return num_processes() == 1 or jax.process_index() == 0


def process_name(index: int) -> str:
    """Names a process and its host, such as `process 1 (node2)`."""
    return f"process {index} ({_host_names[index]})"


def describe() -> str:
    """Names all processes and their hosts."""
    return ", ".join(process_name(index) for index in range(num_processes()))


def all_gather(value: _T) -> list[_T]:
    """Returns the JSON values of all processes, in their order. Collective."""
    if num_processes() == 1 or _is_alone:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    # Few lengths, because each is compiled.
    padded = np.zeros(max(1024, 2 ** math.ceil(math.log2(sizes.max()))), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def broadcast_from_primary(function: Callable[[], _T]) -> _T:
    """Calls a function in the primary process, returns its result in all. Collective.

    The others wait for as long as it takes. Within it the primary is alone: nothing is
    collective, and `StopRequests.check` also obeys requests to stop the others.

    Args:
      function: Returns a JSON value.

    Raises:
      Exception: What `function` raised; in the others one of its kind and text.
    """
    global _is_alone
    if num_processes() == 1 or _is_alone:
        return function()
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    if is_primary():
        _is_alone = True
        try:
            answer["result"] = function()
        except Exception as error:  # noqa: BLE001  Raised again, in all processes.
            failure = _agreed(error)
            answer["text"] = str(error)
            answer["kind"] = [isinstance(error, kind) for kind in _KINDS].index(True)
        finally:
            _is_alone = False
        _any(True, False)
    else:
        while not _any(False, interrupts.is_requested())[0]:
            pass
    answer = all_gather(answer)[0]
    if "result" not in answer:
        raise failure or _agreed(_KINDS[answer["kind"]](answer["text"]))
    return answer["result"]


_KINDS: tuple[type[Exception], ...] = (
    interrupts.Interrupted,
    OSError,
    FloatingPointError,
    ValueError,
    Exception,
)


def any_process(flag: bool) -> bool:
    """Returns whether any process has set a flag, in 1 to 3 ms. Collective."""
    if num_processes() == 1 or _is_alone:
        return flag or is_other_stopped()
    return bool(_any(flag, False)[0])


def is_other_stopped() -> bool:
    """Returns whether another is known to be asked to stop, for `StopRequests`.

    It is known while the others wait in `broadcast_from_primary`.
    """
    global _next_poll
    if not _is_alone or time.monotonic() < _next_poll:
        return False
    _next_poll = time.monotonic() + _POLL_SECONDS
    return bool(_any(False, False)[1])


def _any(*flags: bool) -> np.ndarray:
    """Returns of each flag whether any process has set it."""
    where, largest = _make_any()
    own = np.array([flags], np.int32)
    return jax.device_get(largest(jax.make_array_from_process_local_data(where, own)))


@functools.cache
def _make_any() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    # Jitted once: `multihost_utils` does so at each call, which takes 5 ms.
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    mesh = jax.sharding.Mesh(devices, ("processes", "local"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    largest = jax.jit(lambda x: jnp.max(x, axis=0), out_shardings=everywhere)
    return NamedSharding(mesh, PartitionSpec("processes")), largest


def check_shared(folder: pathlib.Path) -> None:
    """Raises a `ValueError` unless all processes see the same folder. Collective."""
    global _folder
    if num_processes() == 1:
        return
    path = folder / "processes.json"

    def write() -> str:
        for old in folder.glob("failed_*.txt"):
            old.unlink()
        start = uuid.uuid4().hex
        path.write_text(json.dumps({"start": start, "hosts": _host_names}, indent=2))
        return start

    start = broadcast_from_primary(write)
    ends, is_seen = time.monotonic() + _SHARED_SECONDS, False
    while not is_seen and time.monotonic() < ends:
        with contextlib.suppress(OSError):
            is_seen = start in path.read_text()
        time.sleep(0.0 if is_seen else 0.1)
    seen = all_gather(is_seen)
    if not all(seen):
        raise _agreed(
            ValueError(
                f"{process_name(seen.index(False))} does not see the folder {folder} "
                f"of {process_name(0)}: a run over several hosts needs a --workdir "
                "that all of them share."
            )
        )
    _folder = folder


def _agreed(error: _Error) -> _Error:
    error.is_agreed = True  # type: ignore[attr-defined]
    return error


def is_agreed(error: BaseException) -> bool:
    """Returns whether all processes raise an error together."""
    return getattr(error, "is_agreed", False)


def lost_process(error: BaseException) -> str | None:
    """Returns what to say of an error by which another process was lost, else None."""
    reason = str(error).partition("\n")[0]
    if num_processes() == 1 or not ("Gloo" in reason or "NCCL" in reason):
        return None
    paths = [] if _folder is None else sorted(_folder.glob("failed_*.txt"))
    reasons = [path.read_text() for path in paths]
    return f"{'; '.join(reasons) or f'lost another process ({reason})'}. {_HINT}"


def disconnect() -> None:
    """Waits for the other processes at the end of the run. Collective."""
    if num_processes() > 1:
        jax.distributed.shutdown()
        _print_if_killed(None)


def fail(code: int, text: str) -> NoReturn:
    """Ends this process, and the others, who repeat what has happened."""
    index = jax.process_index()
    # JAX may notice the loss too, and abort with its page after what was said.
    _print_if_killed(f"error: {text}")
    if _folder is not None:
        with contextlib.suppress(OSError):
            (_folder / f"failed_{index}.txt").write_text(
                f"{process_name(index)} has failed: {text}"
            )
    if index == 0:
        time.sleep(_LINGER_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    _print_if_killed("")
    os._exit(code)


_WATCHER = (
    "trap '' HUP INT QUIT TERM USR1 USR2; "
    'while read -r line; do last=$line; done; [ -z "$last" ] || echo "$last" >&2'
)
_watcher: subprocess.Popen[str] | None = None


def _print_if_killed(text: str | None) -> None:
    """Has a line printed if this process is killed; "" takes it back, None for good.

    JAX aborts a process that loses another, with a page that does not say what to do
    and no chance for Python to (`test_a_process_that_hangs_ends_the_others` and
    `test_processes_that_never_come_are_told_of` in `tests/faults`). A
    shell waits for the end of this process, and prints the last line that it was given.
    """
    global _watcher
    watcher = _watcher or subprocess.Popen(
        ["sh", "-c", _WATCHER], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    _watcher = None if text is None else watcher
    with contextlib.suppress(OSError):
        print(text or "", file=watcher.stdin, flush=True)
        if text is None:
            watcher.communicate()
