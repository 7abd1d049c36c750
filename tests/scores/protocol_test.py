"""Tests of aps_jax.scores.protocol: the words beside every number."""

from aps_jax import config as config_lib
from aps_jax.scores import protocol
from aps_jax.train import evaluation


def test_the_standard_has_a_name():
    assert protocol.differences(protocol.STANDARD) == []
    assert protocol.text(protocol.STANDARD) == (
        "100 full games, epsilon 0.001, up to 30 no-ops, no sticky actions, 108,000 "
        "frames at most (Atari-100k protocol)"
    )


def test_the_paper_preset_follows_it():
    config = config_lib.preset_config("paper")
    assert evaluation.protocol_of(config) == protocol.STANDARD


def test_what_differs_is_said():
    config = config_lib.replace_options(
        config_lib.preset_config("paper"), sticky=0.25, fire_reset=True
    )
    assert protocol.text(evaluation.protocol_of(config)) == (
        "100 full games, epsilon 0.001, up to 30 no-ops, sticky actions 0.25, 108,000 "
        "frames at most, fire_reset True (not Atari-100k: sticky 0.25 (standard 0.0), "
        "fire_reset True (standard none))"
    )


def test_unknown_values_are_no_standard_ones():
    assert protocol.text({"episodes": 100}) == (
        "100 full games, epsilon ?, up to ? no-ops, sticky actions ?, ? frames at most "
        "(not Atari-100k: epsilon unknown (standard 0.001), noop_max unknown (standard "
        "30), sticky unknown (standard 0.0), max_frames unknown (standard 108000))"
    )
