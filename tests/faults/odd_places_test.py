"""Draws streams, folders and environments at random: a whole run, or one clear line."""

import itertools
import json
import random

import odd_places
import pytest

_SEED = 0  # Another one draws other combinations of the same places.


def draws():
    """Returns combinations in which everything of a kind comes at least once."""
    places = (odd_places.STREAMS, odd_places.PATHS, tuple(odd_places.ENVIRONMENTS))
    rng = random.Random(_SEED)
    shuffled = [rng.sample(place, len(place)) for place in places]
    number = max(map(len, places))
    return list(itertools.islice(zip(*map(itertools.cycle, shuffled)), number))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Rows of a run in a place that is not odd."""
    root = tmp_path_factory.mktemp("plain")
    odd_places.make_folder(root)
    done = odd_places.run(root, "files", "plain", *odd_places.PRETRAIN, "--workdir=run")
    assert done.code == 0, done.text
    return (root / "run" / "metrics.csv").read_bytes()


def assert_refused_in_one_line(done, stream):
    assert done.code == 2, done.text
    errors = [line for line in done.text.splitlines() if line.startswith("error: ")]
    is_readable = stream not in ("closed", "full", "stderr_full", "terminal_lost")
    assert len(errors) == is_readable, done.text


@pytest.mark.parametrize("stream, path, environment", draws())
def test_a_whole_run_or_one_clear_line(tmp_path, expected, stream, path, environment):
    root = tmp_path / "root"
    odd_places.make_folder(root)
    done = odd_places.run(
        root, stream, environment, *odd_places.PRETRAIN, f"--workdir={path}"
    )
    assert "Traceback" not in done.text
    if done.code != 0:
        assert_refused_in_one_line(done, stream)
        assert not (root / path / "metrics.csv").exists()  # Before any work.
        return
    rows = (root / path / "metrics.csv").read_bytes()
    if environment == "one_core":  # The last digits depend on the cores.
        rows, expected = (text.count(b"\n") for text in (rows, expected))
    assert rows == expected
    assert json.loads((root / path / "result.json").read_text())
    # What is said to be saved can be read.
    words = (f"--checkpoint={path}", "--workdir=evaluated")
    done = odd_places.run(root, stream, environment, *odd_places.EVALUATE, *words)
    assert "Traceback" not in done.text
    assert done.code == 0, done.text
    result = json.loads((root / "evaluated" / "result.json").read_text())
    assert result["pretrain_frames"] == 640
