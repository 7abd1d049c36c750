"""Runs the commands and the Python of docs/tutorial.md, in the order of the page."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"


def blocks(language):
    """The page's code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_page_has_commands_and_code():
    assert blocks("sh")
    assert blocks("python")


def test_commands_run_and_write_what_the_page_names(tmp_path):
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[:3] == ["python", "-m", "experiments.maze"], line
            finished = subprocess.run(
                [sys.executable, *words[1:]],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                check=False,
                text=True,
                timeout=600,
            )
            assert finished.returncode == 0, finished.stderr
    named = re.findall(r"`runs/tutorial/([a-z_]+\.[a-z]+)`", PAGE.read_text())
    assert len(named) >= 4
    for name in named:
        assert (tmp_path / "runs" / "tutorial" / name).stat().st_size > 0


def test_python_runs_as_one_session(capsys):
    session = {}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), session)
    printed = capsys.readouterr().out
    expected = "".join(blocks("text"))
    assert printed == expected
