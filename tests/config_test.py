"""Tests of aps_jax.config."""

import dataclasses
import json
import pathlib
import re

import pytest

from aps_jax import config as config_lib
from aps_jax.agents import AGENTS, aps
from aps_jax.envs import atari


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("preset", config_lib.PRESETS)
def test_a_config_survives_json(preset, agent):
    config = config_lib.preset_config(preset, agent)
    values = json.loads(json.dumps(config_lib.to_dict(config)))
    assert config_lib.from_dict(values) == config


def test_the_paper_preset_has_the_papers_values():
    config = config_lib.preset_config("paper")
    learner = config.learner
    assert config.pretrain_agent_steps == 50_000_000
    assert (learner.feature_dim, learner.num_neighbors) == (5, 12)
    assert (learner.n_steps, learner.discount, learner.task_steps) == (10, 0.99, 10)
    assert (learner.learning_rate, learner.adam_epsilon) == (1e-4, 1.5e-4)
    assert (learner.batch_size, learner.target_period) == (32, 100)
    assert (learner.distance_offset, learner.distance_clip) == (1.0, 1e-4)
    assert config.pretrain.samples_per_step == 3.2
    assert config.finetune.finetune_agent_steps == 100_000
    assert config.finetune.infer_agent_steps == 40_000
    assert config.evaluation.eval_episodes == 100
    assert config.evaluation.eval_epsilon == 0.001
    environment = config.environment
    assert (environment.noop_max, environment.sticky) == (30, 0.0)
    assert environment.max_frames == 108_000


def test_a_window_holds_its_targets_their_steps_and_its_history():
    learner = aps.Config(window_targets=4, n_steps=10, batch_size=32)
    assert learner.window_states == 14
    sizes = {"replay_size": 16, "num_envs": 1, "window_targets": 4, "n_steps": 10}
    with pytest.raises(ValueError, match="holds 16 .* one window of 17"):
        config_lib.replace_options(config_lib.Config(), **sizes)
    # Atari's three frames of history are no part of a window of a maze.
    world = config_lib.preset_config("maze")
    assert world.observation.stack == 1
    config_lib.replace_options(world, **{**sizes, "replay_size": 14})
    with pytest.raises(ValueError, match="holds 13 .* one window of 14"):
        config_lib.replace_options(world, **{**sizes, "replay_size": 13})


def test_a_frame_of_a_world_is_an_agent_step():
    config = config_lib.preset_config("minatar")
    assert config.pretrain_agent_steps == config.pretrain.pretrain_frames
    assert config.game == "minatar/Breakout"


@pytest.mark.parametrize(
    "game, encoder, fitting",
    [
        ("minatar/Breakout", "nature", "minatar, mlp"),
        ("maze/spiral/pixels", "mlp", "small, nature, paper"),
        ("Pong", "minatar", "small, nature, paper"),
    ],
)
def test_an_encoder_that_does_not_fit_is_one_clear_line(game, encoder, fitting):
    with pytest.raises(
        ValueError, match=f"{encoder} does not fit.*{fitting}"
    ) as caught:
        config_lib.replace_options(config_lib.Config(), game=game, encoder=encoder)
    assert "\n" not in str(caught.value)
    # Also where an agent is made for another game than that of its config.
    config = config_lib.preset_config("maze")
    with pytest.raises(ValueError, match="mlp does not fit grey images"):
        config.make_agent(3, atari.OBSERVATION)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_neighbors": 256}, "num_neighbors must be less than num_particles.*256"),
        ({"further_tasks": 32}, "further_tasks must be less than batch_size / .* 32"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0.0, got -0.1"),
        (
            {"learning_rate": float("nan")},
            "learning_rate must be at least 0.0, got nan",
        ),
        ({"discount": 1.5}, "discount must be at most 1.0, got 1.5"),
        ({"discount": 1.0}, "unit_values needs a discount below 1"),
        ({"encoder": "resnet"}, "encoder must be one of small, nature, paper"),
        ({"batch_size": 10, "window_targets": 3}, "multiple of window_targets, got 10"),
        ({"skill_weight": 0.0, "entropy_weight": 0.0}, "must not both be 0"),
        ({"infer_agent_steps": 100_000}, "must be less than finetune_agent_steps"),
        ({"replay_size": 64 * 13}, "holds 13 agent steps of each of 64.*window of 14"),
        ({"pretrain_frames": 100}, "must give each of 64 environments an agent step"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"agent": "apt"}, "agent must be one of aps, visr, entropy, .*got 'apt'"),
        (
            {"agent": "dqn", "feature_dim": 3},
            "dqn has no option feature_dim.*aps, visr",
        ),
        (
            {"finetune_batch_size": 9, "window_targets": 2},
            "finetune_batch_size must be",
        ),
        ({"num_envs": 2.5}, "num_envs must be int, got 2.5"),
        ({"noop_max": 0}, "noop_max must be at least 1, got 0"),
        ({"colour": 1}, "no option 'colour'"),
    ],
)
def test_a_wrong_value_is_named_with_its_number(options, message):
    with pytest.raises(ValueError, match=message):
        config_lib.replace_options(config_lib.Config(), **options)


def test_the_unit_of_values_is_that_of_one_step():
    learner = aps.Config(discount=0.75)
    assert learner.value_unit == 0.25
    without = aps.Config(discount=1.0, unit_values=False)
    assert without.value_unit == 1.0


@pytest.mark.parametrize("form", aps.TD_FORMS)
def test_the_exploration_value_is_apart_in_two_forms(form):
    learner = aps.Config(td_form=form)
    assert learner.has_exploration_value == (form in ("off_policy", "split"))


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="minatar, maze, atari100k, got 'tpu'"):
        config_lib.preset_config("tpu")


def test_naming_an_agent_gives_its_values_unless_given():
    base = config_lib.preset_config("smoke")
    dqn = config_lib.replace_options(base, agent="dqn", n_steps=2)
    assert dqn == config_lib.replace_options(
        config_lib.preset_config("smoke", "dqn"), n_steps=2
    )
    assert config_lib.replace_options(base, agent="visr").learner.entropy_weight == 0.0
    mixed = config_lib.replace_options(base, agent="visr", entropy_weight=0.5)
    assert (mixed.learner.skill_weight, mixed.learner.entropy_weight) == (1.0, 0.5)


def test_an_option_that_an_older_config_lacks_takes_its_default_with_a_notice():
    values = config_lib.to_dict(config_lib.preset_config("cpu"))
    del values["learner"]["n_steps"], values["evaluation"]
    notices = []
    config = config_lib.from_dict(values, notices.append)
    assert config.learner.n_steps == 10
    assert config.evaluation == config_lib.EvaluationConfig()
    assert config.learner.hidden_units == 128
    assert any("n_steps" in notice for notice in notices)
    assert any("evaluation" in notice for notice in notices)


@pytest.mark.parametrize("place", ["learner", "top", "agent"])
def test_an_unknown_option_is_refused(place):
    values = config_lib.to_dict(config_lib.Config())
    if place == "learner":
        values["learner"]["momentum"] = 0.9
    elif place == "top":
        values["momentum"] = 0.9
    else:
        values["agent"] = "momentum"
    with pytest.raises(ValueError, match="momentum"):
        config_lib.from_dict(values)


def test_whole_numbers_are_taken_for_floats_and_nothing_else():
    config = config_lib.replace_options(config_lib.Config(), sticky=1, discount=0)
    assert (config.environment.sticky, config.learner.discount) == (1.0, 0.0)
    for wrong in ("1", True, None):
        with pytest.raises(ValueError, match="discount must be float"):
            config_lib.replace_options(config_lib.Config(), discount=wrong)


def test_every_option_has_a_sentence():
    for name, field in config_lib.all_option_fields().items():
        assert re.fullmatch(r"[A-Z].{15,}\.", field.metadata["help"]), name


def test_every_option_is_read():
    """Each field is used somewhere as an attribute."""
    root = pathlib.Path(__file__).parents[1]
    sources = "".join(
        path.read_text()
        for folder in ("aps_jax", "experiments")
        for path in (root / folder).rglob("*.py")
    )
    for name in config_lib.all_option_fields():
        assert re.search(rf"\.{name}\b", sources), name


def test_options_say_what_a_resumed_run_may_change():
    fields = config_lib.all_option_fields()
    resumable = {name for name, field in fields.items() if field.metadata["resumable"]}
    assert {"num_devices", "keep_checkpoints", "checkpoint_agent_steps"} <= resumable
    assert not {"seed", "game", "n_steps", "batch_size"} & resumable


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_lib.Config().seed = 3
