"""Tests of experiments.train: an agent from reward alone, on the real Pong."""

import json

import pytest
from scripts import set_flags

from experiments import train

pytestmark = pytest.mark.usefixtures("parsed_flags")


def test_an_agent_learns_from_scratch_and_goes_on_where_it_stopped(tmp_path, capsys):
    run = {"preset": "smoke", "agent": "der", "max_frames": 200, "evaluations": 1}
    run |= {"finetune_agent_steps": 80, "infer_agent_steps": 40}
    set_flags(workdir=str(tmp_path / "run"), **run)
    train.main(["train"])
    said = capsys.readouterr().out
    assert "2 full games" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["agent"], result["init"], result["pretrain_frames"]) == (
        "der",
        None,
        0,
    )
    assert result["updates"] > 0
    train.main(["train"])  # Finished: nothing is played again.
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result


def test_wrong_words_and_options_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unexpected words 'Pong'"):
        train.main(["train", "Pong"])
    with pytest.raises(ValueError, match="--workdir=DIR is needed"):
        train.main(["train"])
    set_flags(
        workdir=str(tmp_path / "run"), preset="smoke", agent="der", value_min=20.0
    )
    with pytest.raises(ValueError, match="value_min must be less than value_max"):
        train.main(["train"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "game, weight, is_named",
    [("Freeway", None, True), ("Freeway", 0.01, False), ("Breakout", None, False)],
)
def test_the_published_weight_of_contrast_is_named(game, weight, is_named, capsys):
    set_flags(agent="curl", game=game, preset="atari100k", auxiliary_weight=weight)
    with pytest.raises(ValueError, match="--workdir=DIR is needed"):
        train.main(["train"])
    note = f"Note: CURL's published code has --auxiliary_weight=0.01 in {game}.\n"
    assert capsys.readouterr().out == (note if is_named else "")
