"""The processes of a run over several hosts: what they agree on, and who is gone.

`jax.distributed` connects them, and process 0 holds the store through which they speak.
A run of one process is not connected, and all here is then of no effect: it is the first,
and it agrees with itself.
"""

import contextlib
import ctypes
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import jax
from jax._src import distributed  # The store has no public name.

from aps_jax.parallel import interrupts

_T = TypeVar("_T")

# How long a process may say nothing before the others take it for dead; and where an
# operation of all has failed already, so that somebody must be.
_PATIENCE_SECONDS = 30.0
_SHORT_PATIENCE_SECONDS = 6.0
_BEAT_SECONDS = 1.0
# A process whose own threads did not run for as long cannot judge the others.
_STARVED_SECONDS = 5.0
# How long process 0, who holds the store, waits for the others to read why it ends.
_LINGER_SECONDS = 5.0
# JAX's own watch, which ends processes without a word of ours, comes after this one.
_JAX_PATIENCE_SECONDS = 100

_FIRST_PORT, _NUM_PORTS = 61440, 4096  # above those that systems give to clients


class Place(NamedTuple):
    """Which process this is, of how many, and where they meet."""

    coordinator: str  # HOST:PORT, of process 0
    count: int
    index: int
    devices: tuple[int, ...] | None  # this process's of the host's; None for all
    found: str  # by what it was found, in words


class Stop(Protocol):
    """Requests to stop, such as `interrupts.StopRequests`."""

    def is_requested(self) -> bool: ...


def find_place(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> Place | None:
    """Finds out which process of a run this is, from flags or from Slurm.

    Args:
      coordinator_address: `HOST:PORT` of process 0.
      num_processes: How many there are. 1 also where Slurm says otherwise.
      process_id: Which this is.
      environment: Variables. A Slurm step of several tasks is a run of as many processes.

    Returns:
      The place, None for a run of one process.

    Raises:
      ValueError: The flags are incomplete or contradict each other.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if num_processes == 1 and process_id in (None, 0):
        return None
    if all(value is None for value in given.values()):
        return _place_in_slurm(environment)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        present = [name for name in given if name not in missing]
        raise ValueError(
            f"{' and '.join(present)} without {' and '.join(missing)}: a run over "
            "several hosts needs all three, on Slurm none of them."
        )
    host, colon, port = coordinator_address.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            "--coordinator_address must be HOST:PORT of process 0, got "
            f"{coordinator_address!r}."
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be in [0, {num_processes}), the --num_processes, got "
            f"{process_id}."
        )
    return Place(coordinator_address, num_processes, process_id, None, "by flags")


def _place_in_slurm(environment: Mapping[str, str]) -> Place | None:
    count = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1:
        return None
    needed = (
        *("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"),
        *("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID"),
    )
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"This is one of {count} tasks of a Slurm step, and {', '.join(missing)} is "
            "not set: give --coordinator_address, --num_processes and --process_id."
        )
    nodes = environment["SLURM_STEP_NODELIST"]
    # Such as node[007-009,12],other: the first is node007.
    first = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*)", nodes)
    number = int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    return Place(
        f"{''.join(part or '' for part in first.groups())}:"
        f"{_FIRST_PORT + number % _NUM_PORTS}",
        count,
        int(environment["SLURM_PROCID"]),
        _devices_in_slurm(environment),
        "by Slurm",
    )


def _devices_in_slurm(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Shares a node's GPUs among its tasks, unless Slurm has done so."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # Such as 4(x2),3: four tasks on each of two nodes, and three.
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
    most = max(int(count) for count in counts)
    if most == 1 or len(visible) < most:
        return None
    own = len(visible) // most
    first = own * int(environment["SLURM_LOCALID"])
    return tuple(range(first, first + own))


class _Team:
    """This process among the others, once they are connected."""

    def __init__(self, place: Place, client: Any):
        self.place = place
        self.client = client
        self.names: list[str] = []
        self.asked = 0  # questions to process 0 so far, the same number in all
        self.is_first_alone = False  # while process 0 answers one
        self.stop: Stop | None = None
        # How the run can go on, for those who lose it.
        self.last_words: Callable[[], str] = lambda: "The same commands start it again"
        self.is_broken = False  # an operation of all has failed
        self.is_first_gone = False  # and with it the store
        self._beats = 0
        self._is_over = threading.Event()
        self._is_ending = threading.Lock()
        self._lock = threading.Lock()
        self._own: dict[str, Any] = {}
        self._others: dict[int, dict[str, Any]] = {}
        self._heard = dict.fromkeys(range(place.count), time.monotonic())
        self._answered = time.monotonic()

    def start(self) -> None:
        """Starts to watch the others."""
        threading.Thread(target=self._speak, daemon=True).start()
        threading.Thread(target=self._judge, daemon=True).start()

    def who(self, index: int) -> str:
        """Names a process."""
        host = f" ({self.names[index]})" if index < len(self.names) else ""
        return f"process {index}{host}"

    def is_stop_wished(self) -> bool:
        """Whether this process or another was asked to stop."""
        return any(state.get("stop") for state in [*self._states(), self._own])

    def _states(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._others.values())

    def ended(self, index: int) -> int | None:
        """Returns the exit code of a process that has ended in order, else None."""
        with self._lock:
            return self._others.get(index, {}).get("done")

    def say(self, **changes: Any) -> None:
        """Tells the others something of this process, at once."""
        with self._lock:
            self._own.update(changes)
            self._beats += 1
            text = json.dumps({**self._own, "beat": self._beats})
        self.client.key_value_set(
            f"aps/state/{self.place.index}", text, allow_overwrite=True
        )

    def close(self) -> None:
        """Stops to watch."""
        self._is_over.set()

    def _speak(self) -> None:
        """Tells every second that this process lives, and listens to the others."""
        while not self._is_over.wait(_BEAT_SECONDS):
            is_asked = self.stop is not None and self.stop.is_requested()
            try:
                self.say(**({"stop": True} if is_asked else {}))
                entries = self.client.key_value_dir_get("aps/state/")
            except jax.errors.JaxRuntimeError:
                continue  # The judge counts the seconds.
            now = self._answered = time.monotonic()
            with self._lock:
                for key, text in entries:
                    index, state = int(key.rpartition("/")[2]), json.loads(text)
                    if state != self._others.get(index):
                        self._heard[index] = now
                    self._others[index] = state

    def _judge(self) -> None:
        """Ends this process when another has failed or is gone."""
        before = time.monotonic()
        while not self._is_over.wait(0.2):
            now = time.monotonic()
            if now - before > _STARVED_SECONDS:
                with self._lock:
                    self._heard = dict.fromkeys(self._heard, now)
                self._answered = now
            before = now
            text = self._verdict(now)
            if text is not None and not self._is_over.is_set():
                self.end(text)

    def _verdict(self, now: float) -> str | None:
        patience = _SHORT_PATIENCE_SECONDS if self.is_broken else _PATIENCE_SECONDS
        with self._lock:
            others = {i: self._others.get(i, {}) for i in range(self.place.count)}
            silent = {i: now - heard for i, heard in self._heard.items()}
        del others[self.place.index]
        for index, state in others.items():
            if "failed" in state:
                return f"{self.who(index)} has failed: {state['failed']}"
            if "lost" in state:  # It knows better than we why it left.
                return state["lost"]
        if self.place.index > 0 and now - self._answered > patience:
            self.is_first_gone = True
            return f"{self.who(0)}, which connects all others, is gone"
        for index, state in others.items():
            if "done" not in state and silent[index] > patience:
                return (
                    f"{self.who(index)} is gone: not heard of for {silent[index]:.0f} s"
                )
        return None

    def end(self, text: str) -> NoReturn:
        """Ends this process because the run is lost, and says why.

        Args:
          text: What has happened.
        """
        with self._is_ending:  # For good: whoever comes second waits for the exit.
            _say(f"error: {text}. {self.last_words()}.")
            code = interrupts.EXIT_CODE if self.is_stop_wished() else 1
            self.leave(code, done=code, lost=text)

    def leave(self, code: int, **last: Any) -> NoReturn:
        """Ends this process at once; the first waits until the others know."""

        def tell() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.say(**last)

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        if not self.is_first_gone:
            teller.join(_LINGER_SECONDS)
        if self.place.index == 0:
            ends = time.monotonic() + _LINGER_SECONDS
            while time.monotonic() < ends and not all(
                self.ended(i) is not None or self._is_silent(i)
                for i in range(1, self.place.count)
            ):
                time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _is_silent(self, index: int) -> bool:
        with self._lock:
            heard, state = self._heard[index], self._others.get(index, {})
        return time.monotonic() - heard > _SHORT_PATIENCE_SECONDS or "failed" in state


_team: _Team | None = None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def connect(
    place: Place, alike: Mapping[str, Any], *, timeout_seconds: int = 300
) -> None:
    """Connects this process to the others, before JAX has begun to compute.

    Args:
      place: Which process this is.
      alike: JSON values that must be the same in all processes, by name.
      timeout_seconds: How long to wait for the others.

    Raises:
      ValueError: They cannot be reached, or something differs.
    """
    global _team
    if place.index > 0:
        _knock(place.coordinator, timeout_seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM, which `interrupts` listens to.
    jax.config.update("jax_enable_preemption_service", False)
    _on_abort(
        lambda: _say(
            f"error: the {place.count} processes of this run did not all come to "
            f"{place.coordinator} within {timeout_seconds} s, or do not fit together: "
            "JAX's reason stands above"
        )
    )
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=_JAX_PATIENCE_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"Cannot serve at {place.coordinator}, the coordinator_address: "
            f"{str(error).splitlines()[0]}. Is the port in use?"
        ) from error
    team = _Team(place, distributed.global_state.client)
    _team = team
    _on_abort(lambda: _explain_abort(team))
    team.start()
    _introduce(team, alike)


def _knock(address: str, timeout_seconds: float) -> None:
    """Waits until somebody listens at an address."""
    host, _, port = address.rpartition(":")
    ends = time.monotonic() + timeout_seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > ends:
                raise ValueError(
                    f"No answer from process 0 at {address}, the coordinator_address, "
                    f"within {timeout_seconds:g} s ({error}). Was it started, and does "
                    "the network let this port through?"
                ) from error
        time.sleep(0.2)


def _introduce(team: _Team, alike: Mapping[str, Any]) -> None:
    """Tells the others who this is, and checks that all were started alike."""
    index, count = team.place.index, team.place.count
    own = {"host": platform.node(), "alike": dict(alike)}
    team.client.key_value_set(f"aps/hello/{index}", json.dumps(own))
    hellos = [json.loads(_wait(team, f"aps/hello/{i}")) for i in range(count)]
    team.names = [hello["host"] for hello in hellos]
    there, here = hellos[0]["alike"], json.loads(json.dumps(own["alike"]))
    differences = [
        f"{name} is {here.get(name)!r} here and {there.get(name)!r} there"
        for name in sorted(set(here) | set(there))
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise ValueError(
            f"{team.who(index)} was started otherwise than {team.who(0)}: "
            f"{'; '.join(differences)}."
        )
    # Nobody goes on before all have compared: one that differs ends the others.
    team.client.key_value_set(f"aps/fits/{index}", "yes")
    for i in range(count):
        _wait(team, f"aps/fits/{i}")


def _wait(team: _Team, key: str) -> str:
    """Waits for a key of the store, however long; who loses the others is ended."""
    while True:
        try:
            return team.client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                await_verdict()
                raise
        code = team.ended(0)
        if code == interrupts.EXIT_CODE:
            raise interrupts.Interrupted("process 0 was stopped")


def is_connected() -> bool:
    """Returns whether this process is one of several."""
    return _team is not None


def num_processes() -> int:
    """Returns how many processes there are."""
    return 1 if _team is None else _team.place.count


def process_index() -> int:
    """Returns which of them this is."""
    return 0 if _team is None else _team.place.index


def is_first() -> bool:
    """Returns whether this is process 0, which writes and speaks for all."""
    return process_index() == 0


def text() -> str:
    """Says which processes there are."""
    if _team is None:
        return "one process"
    names = ", ".join(dict.fromkeys(_team.names))
    return (
        f"{_team.place.count} processes, found {_team.place.found}, on {names}; they "
        f"meet at {_team.place.coordinator}"
    )


def by_first(function: Callable[[], _T]) -> _T:
    """Calls a function in process 0 alone, and returns its result in all.

    All processes must call it in the same order. Within it process 0 is alone, so that
    calls inside are its own; the others wait for as long as it takes.

    Args:
      function: Returns a JSON value.

    Raises:
      interrupts.Interrupted: `function` was interrupted. Its other errors are raised in
        process 0, and end the others.
    """
    team = _team
    if team is None or team.is_first_alone:
        return function()
    team.asked += 1
    key = f"aps/answer/{team.asked}"
    if team.place.index > 0:
        answer = json.loads(_wait(team, key))
        if "interrupted" in answer:
            raise interrupts.Interrupted(answer["interrupted"])
        return answer["result"]
    team.is_first_alone = True
    try:
        result = function()
    except interrupts.Interrupted as error:
        team.client.key_value_set(key, json.dumps({"interrupted": str(error)}))
        raise
    finally:
        team.is_first_alone = False
    team.client.key_value_set(key, json.dumps({"result": result}))
    return result


def gather(value: _T) -> list[_T]:
    """Returns the JSON values of all processes, in their order; all must call it."""
    team = _team
    if team is None or team.is_first_alone:
        return [value]
    team.asked += 1
    key = f"gathered/{team.asked}"
    tell(f"{key}/{team.place.index}", value)
    return [hear(f"{key}/{index}") for index in range(team.place.count)]


def tell(key: str, value: Any) -> None:
    """Tells all processes a JSON value under a name that is used once."""
    _team.client.key_value_set(f"aps/told/{key}", json.dumps(value))


def hear(key: str) -> Any:
    """Waits for what a process tells under a name."""
    return json.loads(_wait(_team, f"aps/told/{key}"))


def check_shared(folder: Any) -> None:
    """Checks that all processes see the same folder, by a file of process 0's.

    Raises:
      ValueError: This one does not.
    """
    if num_processes() == 1:
        return
    path = folder / "hosts.json"

    def write() -> str:
        token = uuid.uuid4().hex
        path.write_text(json.dumps({"start": token, "hosts": _team.names}, indent=2))
        return token

    token = by_first(write)
    ends = time.monotonic() + 60.0  # Network file systems show new files late.
    while True:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text())["start"] == token:
                break
        if time.monotonic() > ends:
            raise ValueError(
                f"{folder} of {_team.who(process_index())} is not the folder of that "
                f"name of {_team.who(0)}: a run over several hosts needs a --workdir "
                "on a file system that all of them share."
            )
        time.sleep(0.1)
    gather(None)  # Nobody goes on before all have found it.


def set_last_words(words: Callable[[], str]) -> None:
    """Sets what a process says when it loses the others: how the run can go on."""
    if _team is not None:
        _team.last_words = words


@contextlib.contextmanager
def listening(stop: Stop) -> Iterator[None]:
    """Tells the others of a request to stop this process."""
    if _team is not None:
        _team.stop = stop
    try:
        yield
    finally:
        if _team is not None:
            _team.stop = None


def is_stop_wished() -> bool:
    """Returns whether some process was asked to stop, as far as is known here."""
    return _team is not None and _team.is_stop_wished()


def is_of_all(error: BaseException) -> bool:
    """Returns whether an error may be that of an operation of all processes."""
    return _team is not None and (
        isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    )


def await_verdict() -> None:
    """Waits after a failed operation of all until it is known who is gone.

    Returns only if nobody is: then the error is this process's own.
    """
    if _team is not None:
        _team.is_broken = True
        time.sleep(_SHORT_PATIENCE_SECONDS + 4.0)


def finish(code: int) -> None:
    """Parts from the others at the end of a run that all have ended."""
    global _team
    if _team is None:
        return
    _team.say(done=code)
    _team.close()
    jax.distributed.shutdown()
    _on_abort(None)
    _team = None


def fail(code: int, reason: str) -> None:
    """Ends this process for an error of its own, and with it the others.

    Returns only in a run of one process.
    """
    if _team is not None:
        _team.leave(code, failed=reason, done=code)


def _explain_abort(team: _Team) -> None:
    """Says in words of ours why JAX's runtime has ended the process."""
    text = "JAX has ended this process for the reason above"
    if team.place.index > 0:
        host, _, port = team.place.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
        except OSError:
            team.is_first_gone = True
            text = f"{team.who(0)}, which connects all others, is gone"
    team.end(text)


_abort_handler: Any = None  # Must live as long as it is installed.


def _on_abort(function: Callable[[], None] | None) -> None:
    """Calls a function when JAX's runtime aborts the process, which it does when it
    loses process 0, after a page of its own words and none of ours.

    Python's own handlers wait for the main thread, which an abort never comes back to.
    """
    global _abort_handler
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc = ctypes.CDLL(None)

    def handle(number: int) -> None:
        del number
        function()
        os._exit(1)

    handler = kind(handle) if function is not None else kind(0)
    libc.signal.argtypes = [ctypes.c_int, kind]
    libc.signal(signal.SIGABRT, handler)
    _abort_handler = handler
