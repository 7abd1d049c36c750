"""Starts scripts as strange machines do: odd streams, folders and environments."""

import contextlib
import fcntl
import os
import pathlib
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import scripts

_SECONDS = 900.0  # after which a script is taken for hanging
Reader = Callable[[], str]

# The least that scripts can do.
PRETRAIN = (
    *("experiments.pretrain", "--game=Pong", "--preset=smoke"),
    *("--pretrain_frames=640", "--warmup_agent_steps=80"),
)
EVALUATE = (
    *("experiments.evaluate", "--eval_episodes=1", "--max_frames=40"),
    "--infer_agent_steps=20",
)

STREAMS = (
    *("files", "closed", "full", "stderr_full", "pipe_closed", "terminal"),
    *("terminal_dumb", "terminal_odd", "terminal_without_size", "terminal_lost"),
)

# Folders of a run, below one that is made for the test. A `link/` leads elsewhere.
PATHS = (
    *("plain", "a b#c", "lr=[1e-4]", "back\\slash", "quo'te\"s", "*?{x}%s$HOME"),
    *("\u00e9t\u00e9 \u2603", "not utf-8 \udcff\udcfe", "a/../b/./c", "trailing/"),
    *("link/inside", "new\nline", "-dash", "gs:x", "n" * 200),
)

_ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
_NO_CACHE = {"JAX_COMPILATION_CACHE_DIR": None, "XDG_CACHE_HOME": None}
# Variables to set, or to take away where the value is None.
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "plain": {},
    "no_home": {**_NO_CACHE, "HOME": None, "ODD_PLACE": "no_passwd"},
    "unwritable_home": {**_NO_CACHE, "HOME": "/proc/nowhere"},
    "no_locks": {"ODD_PLACE": "no_locks"},
    "one_core": {"ODD_PLACE": "one_core"},
    "no_home_64_bits": {
        **_NO_CACHE,
        "HOME": None,
        "ODD_PLACE": "no_passwd",
        "JAX_ENABLE_X64": "1",
    },
    "64_bits": {"JAX_ENABLE_X64": "1"},
    "ascii": _ASCII,
    "forced_color": {"FORCE_COLOR": "1", "COLUMNS": "1"},
    "no_temporary_folder": {"TMPDIR": "/nowhere"},
}

# Python runs this before the script.
_SITE = """
import errno, os
place = os.environ.get("ODD_PLACE")
if place == "no_passwd":
    import pwd
    def unknown(*_):
        raise KeyError("no such user")
    pwd.getpwuid = pwd.getpwnam = unknown
elif place == "no_locks":
    import fcntl
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = fcntl.lockf = refuse
elif place == "one_core":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
"""


class Done(NamedTuple):
    """How a script ended."""

    code: int
    text: str  # all that could be read of its output


def make_folder(root: pathlib.Path) -> None:
    """Makes the folder below which `PATHS` are."""
    (root / "elsewhere").mkdir(parents=True)
    (root / "link").symlink_to("elsewhere")
    (root / "sitecustomize.py").write_text(_SITE)


def run(root: pathlib.Path, stream: str, environment: str, *words: str) -> Done:
    """Runs a script in `root`, so that its words may name relative folders."""
    terms = {"terminal_dumb": "dumb", "terminal_odd": "no-such-terminal"}
    changed: dict[str, str | None] = {
        "PYTHONPATH": os.pathsep.join([str(root), str(scripts.ROOT)]),
        "TERM": terms.get(stream, "xterm"),
        # Strictness is for tests of the library.
        "JAX_NUMPY_RANK_PROMOTION": None,
        "JAX_NUMPY_DTYPE_PROMOTION": None,
        **ENVIRONMENTS[environment],
    }
    env = {name: value for name, value in os.environ.items() if name not in changed}
    env |= {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-m", *words]
    if stream == "closed":
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    with _opened(stream, root / "log") as (out, err, read):
        process = subprocess.Popen(
            command, cwd=root, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            code = process.wait(_SECONDS)
        finally:
            process.kill()
    return Done(code, read())


@contextlib.contextmanager
def _opened(stream: str, log: pathlib.Path) -> Iterator[tuple[int, int, Reader]]:
    """Opens standard output and error; the third returns what they were sent."""
    if stream.startswith("terminal"):
        reader, out = pty.openpty()
        size = (0, 0) if stream == "terminal_without_size" else (24, 200)
        fcntl.ioctl(out, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        sent: list[bytes] = []
        # A terminal that nobody reads stops those who write to it.
        thread = threading.Thread(target=_drain, args=(reader, sent))
        if stream != "terminal_lost":
            thread.start()
        else:
            os.close(reader)
        yield out, out, lambda: b"".join(sent).decode(errors="replace")
        os.close(out)
        if stream != "terminal_lost":
            thread.join()
        return
    err = out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    if stream in ("full", "stderr_full"):
        err = os.open("/dev/full", os.O_WRONLY)
        out = err if stream == "full" else out
    elif stream == "pipe_closed":
        reader, out = os.pipe()
        os.close(reader)
    yield out, err, lambda: log.read_text(errors="replace")
    for number in {out, err}:
        os.close(number)


def _drain(reader: int, sent: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # How a terminal that nobody writes to ends.
        while data := os.read(reader, 65_536):
            sent.append(data)
    os.close(reader)
