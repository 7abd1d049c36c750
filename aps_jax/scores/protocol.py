"""How scores are taken: the standard, what differs from it, what is comparable."""

from collections.abc import Mapping
from typing import Any

# Published Atari-100k results and this project's scores should share these values; the
# name is that of the benchmark (rliable, https://arxiv.org/abs/2108.13264).
NAME = "Atari-100k"
STANDARD: Mapping[str, Any] = {
    "episodes": 100,
    "epsilon": 0.001,
    "noop_max": 30,
    "sticky": 0.0,
    "max_frames": 108_000,  # 30 minutes at 60 frames per second
}


def text(values: Mapping[str, Any]) -> str:
    """Describes a protocol, with its name or with how it differs from the standard.

    Args:
      values: What a result holds as its `protocol`; unknown entries are named too.
    """
    if values.get("world"):
        return (
            f"{values['episodes']} full episodes, epsilon {values['epsilon']} "
            "(a world, without a standard protocol)"
        )
    known = {name: "?" for name in STANDARD} | dict(values)
    frames = known["max_frames"]
    parts = [
        f"{known['episodes']} full games",
        f"epsilon {known['epsilon']}",
        f"up to {known['noop_max']} no-ops",
        f"sticky actions {known['sticky']}" if known["sticky"] else "no sticky actions",
        f"{f'{frames:,}' if isinstance(frames, int) else frames} frames at most",
        *(f"{name} {known[name]}" for name in sorted(known.keys() - STANDARD.keys())),
    ]
    changed = differences(values)
    name = f"not {NAME}: {', '.join(changed)}" if changed else f"{NAME} protocol"
    return f"{', '.join(parts)} ({name})"


def differences(values: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each value of a protocol that is not the standard."""
    if values.get("world"):
        return ["a world"]
    names = [*STANDARD, *sorted(values.keys() - STANDARD.keys())]
    return [
        f"{name} {values.get(name, 'unknown')} (standard {STANDARD.get(name, 'none')})"
        for name in names
        if name not in STANDARD or values.get(name, "unknown") != STANDARD[name]
    ]


def is_comparable(values: Mapping[str, Any]) -> bool:
    """Tells whether scores may stand beside random, human and published scores.

    The number of games and epsilon say how a score was measured. Whatever else differs
    (shorter games, sticky actions, FIRE at the start) makes another game, for which
    there are no such scores. A protocol that is not known is not comparable.

    Args:
      values: What a result holds as its `protocol`.
    """
    measured = {name: STANDARD[name] for name in ("episodes", "epsilon")}
    return not differences({**values, **measured})
