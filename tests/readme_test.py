"""Tests that what the README shows is true: its code runs, its commands parse."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_reuse_example_runs():
    (code,) = blocks("python")
    found = {}
    exec(compile(code, "README.md", "exec"), found)  # noqa: S102
    assert found["error"].shape == (32, 5)
    # The rewards were phi's first component, so the task is the first axis.
    assert found["found"].task[0] > 0.999
    assert found["found"].r_squared > 0.999


COMMANDS = [
    line.split("#")[0].strip()
    for block in blocks("bash")
    for line in block.splitlines()
    if line.startswith("python -m")
]


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
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path
