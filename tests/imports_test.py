"""Imports between rooms go one way: each imports only rooms of layers below its own."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# From the bottom up. Rooms of one layer do not import one another.
LAYERS = (
    ("types", "options"),
    ("ops",),
    ("networks",),
    ("replay", "envs"),
    ("agents",),
    ("config",),
    ("parallel", "scores"),
    ("runs",),
    ("train", "report"),
    ("experiments",),
)
LEVELS = {room: level for level, layer in enumerate(LAYERS) for room in layer}
# Rooms that import no other: neither the processes of a run nor the scores of a game
# depend on what is learned.
ALONE = ("parallel", "scores")
# An agent sees what was replayed, and no environment.
CLOSED = {("agents", "envs")}


def room_of(module):
    """Returns the room of a module's full name, None if it is not this project's."""
    package, _, rest = module.partition(".")
    if package == "experiments":
        return package
    return rest.partition(".")[0] or None if package == "aps_jax" else None


def imported_modules(path):
    """Returns the full names that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imported_rooms():
    """Returns (file, its room, an imported room) for every import of another room."""
    for package in ("aps_jax", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT).with_suffix("")
            if relative == pathlib.Path("aps_jax/__init__"):  # The public names.
                continue
            room = room_of(".".join(relative.parts))
            for module in imported_modules(path):
                other = room_of(module)
                if other not in (None, room):
                    yield path.relative_to(ROOT), room, other


FOUND = sorted(set(imported_rooms()))


def test_every_room_has_a_layer():
    rooms = {path.stem for path in (ROOT / "aps_jax").iterdir() if path.suffix == ".py"}
    rooms |= {path.parent.name for path in (ROOT / "aps_jax").glob("*/__init__.py")}
    assert rooms - {"__init__"} == set(LEVELS) - {"experiments"}


def test_the_imports_are_found():
    pairs = {(room, other) for _, room, other in FOUND}
    assert {("networks", "ops"), ("runs", "parallel"), ("experiments", "train")} < pairs


@pytest.mark.parametrize("room", LEVELS)
def test_a_room_imports_rooms_below_it_alone(room):
    upward = [
        f"{path} imports {other}"
        for path, importing, other in FOUND
        if importing == room
        and (LEVELS[other] >= LEVELS[room] or room in ALONE or (room, other) in CLOSED)
    ]
    assert not upward
