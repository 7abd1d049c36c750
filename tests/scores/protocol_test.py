"""Tests of aps_jax.scores.protocol: what stands beside every number."""

import pytest

from aps_jax import config as config_lib
from aps_jax.scores import protocol
from aps_jax.train import evaluation


def test_the_standard_has_a_name():
    assert protocol.differences(protocol.STANDARD) == []
    text = protocol.text(protocol.STANDARD)
    assert text.endswith("(Atari-100k protocol)")
    for part in ("100 full games", "epsilon 0.001", "no sticky", "108,000 frames"):
        assert part in text


def test_the_paper_preset_follows_it():
    config = config_lib.preset_config("paper")
    assert evaluation.protocol_of(config) == protocol.STANDARD


def test_what_differs_is_said():
    config = config_lib.replace_options(
        config_lib.preset_config("paper"), sticky=0.25, fire_reset=True
    )
    values = evaluation.protocol_of(config)
    changed = ["sticky 0.25 (standard 0.0)", "fire_reset True (standard none)"]
    assert protocol.differences(values) == changed
    text = protocol.text(values)
    assert text.endswith(f"(not Atari-100k: {', '.join(changed)})")
    assert "sticky actions 0.25," in text and "fire_reset True (" in text


@pytest.mark.parametrize("frames", [None, "?"])
def test_unknown_values_are_no_standard_ones(frames):
    values = {"episodes": 100} | ({} if frames == "?" else {"max_frames": frames})
    assert len(protocol.differences(values)) == 4
    assert f"epsilon ?, up to ? no-ops, sticky actions ?, {frames} frames" in (
        protocol.text(values)
    )


@pytest.mark.parametrize(
    "change, is_comparable",
    [
        ({}, True),
        ({"episodes": 2}, True),
        ({"epsilon": 0.05}, True),
        ({"max_frames": 400}, False),
        ({"max_frames": 400_000}, False),
        ({"max_frames": None}, False),
        ({"sticky": 0.25}, False),
        ({"noop_max": 1}, False),
        ({"fire_reset": True}, False),
        ({"difficulty": 3}, False),
    ],
)
def test_another_game_is_not_comparable(change, is_comparable):
    assert protocol.is_comparable({**protocol.STANDARD, **change}) == is_comparable


def test_an_unknown_protocol_is_not_comparable():
    assert not protocol.is_comparable({})
    known = {n: v for n, v in protocol.STANDARD.items() if n != "sticky"}
    assert not protocol.is_comparable(known)


@pytest.mark.parametrize("options", [{"max_frames": 400}, {"sticky": 0.25}])
def test_results_hold_no_normalised_score_of_another_game(options):
    config = config_lib.preset_config("cpu")
    played = evaluation.from_lists(
        {"returns": [1.0], "score_returns": [14.6], "lengths": [7]}
    )
    whole = evaluation.summary(config, played)
    assert whole["eval_human_normalized"] == pytest.approx(1.0)  # Pong's human score.
    config = config_lib.replace_options(config, **options)
    cut = evaluation.summary(config, played)
    assert cut["eval_score_mean"] == 14.6
    assert cut["eval_human_normalized"] != cut["eval_human_normalized"]
