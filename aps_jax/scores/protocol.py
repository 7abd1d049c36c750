"""How scores are taken: the standard, and words for whatever differs from it."""

from collections.abc import Mapping
from typing import Any

# Published Atari-100k results and this project's scores should share these values; the
# name is that of the benchmark (rliable, https://arxiv.org/abs/2108.13264).
NAME = "Atari-100k"
STANDARD = {
    "episodes": 100,
    "epsilon": 0.001,
    "noop_max": 30,
    "sticky": 0.0,
    "max_frames": 108_000,  # 30 minutes at 60 frames per second
}


def text(values: Mapping[str, Any]) -> str:
    """Words a protocol, with its name or with what sets it apart from the standard.

    Args:
      values: What a result holds as its `protocol`; unknown entries are worded too.
    """
    rest = dict(values)
    words = [
        f"{rest.pop('episodes', '?')} full games",
        f"epsilon {rest.pop('epsilon', '?')}",
        f"up to {rest.pop('noop_max', '?')} no-ops",
    ]
    sticky = rest.pop("sticky", "?")
    words.append("no sticky actions" if sticky == 0 else f"sticky actions {sticky}")
    max_frames = rest.pop("max_frames", None)
    words.append(f"{'?' if max_frames is None else f'{max_frames:,}'} frames at most")
    words += [f"{name} {value}" for name, value in sorted(rest.items())]
    changed = differences(values)
    name = f"not {NAME}: {', '.join(changed)}" if changed else f"{NAME} protocol"
    return f"{', '.join(words)} ({name})"


def differences(values: Mapping[str, Any]) -> list[str]:
    """Says in words where a protocol is not the standard."""
    names = [*STANDARD, *(name for name in sorted(values) if name not in STANDARD)]
    return [
        f"{name} {values.get(name, 'unknown')} (standard {STANDARD.get(name, 'none')})"
        for name in names
        if name not in STANDARD or values.get(name, "unknown") != STANDARD[name]
    ]
