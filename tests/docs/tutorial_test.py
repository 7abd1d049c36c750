"""Runs the commands and the Python of docs/tutorial.md, in the order of the page."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial.md"


def blocks(language):
    """The page's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_page_has_commands_and_code():
    assert blocks("sh")
    assert blocks("python")


def run(words, folder):
    """Runs Python with the project importable, in an empty folder."""
    finished = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_commands_run_and_write_what_the_page_names(tmp_path):
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            python, *words = shlex.split(line)
            assert [python, *words[:2]] == ["python", "-m", "experiments.run_aps"]
            run(words, tmp_path)
    named = set(re.findall(r"`(runs/tutorial/[a-z_]+\.[a-z]+)`", PAGE.read_text()))
    assert len(named) == 4
    for name in named:
        assert (tmp_path / name).stat().st_size > 0


def test_python_prints_what_the_page_says(tmp_path):
    printed = run(["-c", "".join(blocks("python"))], tmp_path)
    assert printed == "".join(blocks("text"))
