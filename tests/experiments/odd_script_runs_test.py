"""The cheapest of what `tests/faults/odd_places_test.py` draws, all at once."""

import json
import subprocess
import sys

import odd_places
import pytest
import scripts

# Compiles faster than what sees images, and no step of it is four frames.
MAZE = ("--game=maze/open", "--encoder=mlp", "--pretrain_frames=160")


@pytest.fixture
def root(tmp_path):
    odd_places.make_folder(tmp_path / "root")
    return tmp_path / "root"


def test_a_run_without_home_or_output_in_an_odd_folder_is_whole(root):
    path = "a b#c"
    words = (*odd_places.PRETRAIN, *MAZE, f"--workdir={path}")
    done = odd_places.run(root, "full", "no_home_64_bits", *words)
    assert done.code == 0
    result = json.loads((root / path / "result.json").read_text())
    assert result["pretrain_frames"] == 160
    # Another look at what is finished only says how to go on, in words for a shell.
    done = odd_places.run(root, "files", "forced_color", *words)
    assert done.code == 0
    assert "\nNext: python -m experiments.finetune '--init=a b#c' " in done.text
    assert "\x1b" not in done.text


@pytest.mark.parametrize("stream", ["closed"])
def test_an_error_that_cannot_be_shown_is_an_exit_code(root, stream):
    words = ("experiments.pretrain", "--batch_size=0", "--workdir=run")
    assert odd_places.run(root, stream, "plain", *words).code == 2
    assert not (root / "run").exists()


def test_what_libraries_write_to_a_closed_output_is_in_no_file(root):
    program = "import experiments, os, sys; f = open(sys.argv[1], 'w'); "
    program += "[os.write(number, b'x') for number in (1, 2)]"
    command = [sys.executable, "-c", program, root / "file"]
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    subprocess.run([*closing, *command], cwd=scripts.ROOT, check=True)
    assert (root / "file").read_text() == ""
