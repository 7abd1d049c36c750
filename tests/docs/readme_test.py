"""Tests that what the README shows is true: its code runs, its commands parse.

So do those of the documentation.
"""

import importlib
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


PAGES = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("is_64_bits", [False, True])
def test_the_reuse_example_runs(is_64_bits):
    (code,) = blocks("python")
    found = {}
    with jax.enable_x64(is_64_bits):
        exec(compile(code, "README.md", "exec"), found)  # noqa: S102
    assert found["error"].shape == (32, 5)
    assert found["error"].dtype == (np.float64 if is_64_bits else np.float32)
    # The rewards were phi's first component, so the task is the first axis.
    assert found["found"].task[0] > 0.999
    assert found["found"].r_squared > 0.95


# Without what stands before them, such as XLA_FLAGS=..., and with the lines that go on.
COMMANDS = [
    command.strip()
    for text in (README, *PAGES.values())
    for block in blocks("bash", text)
    for command in re.findall(
        r"python -m experiments[^#\n]*", block.replace("\\\n", " ")
    )
]


def test_commands_are_found_in_several_pages():
    assert len(COMMANDS) > 12
    assert any("--num_devices=2" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_names_a_script_and_its_flags(command):
    _, _, module, *words = shlex.split(command)
    importlib.import_module(module)
    with flagsaver.flagsaver():
        assert flags.FLAGS(["script", *words]) == ["script"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    used = set(
        re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.MULTILINE)
    )
    assert used == {"demo", "test"}
    for target in used:
        assert f"\n{target}:" in makefile


def test_files_named_exist():
    named = re.findall(r"\]\(([^)#]+)|src=\"([^\"]+)\"", README)
    for path in map("".join, named):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


def test_the_page_is_short_and_its_first_screen_shows_what_this_is():
    assert README.count("\n") <= 160
    first_screen = README.split("\n## ")[0]
    assert len(blocks("bash", first_screen)[0].splitlines()) == 3
    assert first_screen.count("<img ") == 1


def test_the_map_names_each_room_in_at_most_twelve_rows():
    rooms = re.findall(r"^\| `([^`]+)/` \|", README, flags=re.MULTILINE)
    assert len(rooms) <= 12
    packages = (ROOT / "aps_jax").glob("*/__init__.py")
    expected = {f"aps_jax/{path.parent.name}" for path in packages}
    assert set(rooms) == expected | {"experiments"}
