"""Tests of aps_jax.config."""

import dataclasses
import json
import pathlib
import re

import pytest

from aps_jax import config as config_lib


@pytest.mark.parametrize("preset", config_lib.PRESETS)
def test_a_config_survives_json(preset):
    config = config_lib.preset_config(preset)
    values = json.loads(json.dumps(config_lib.to_dict(config)))
    assert config_lib.from_dict(values) == config


def test_the_paper_preset_has_the_papers_values():
    config = config_lib.preset_config("paper")
    learner = config.learner
    assert config.pretrain.pretrain_agent_steps == 50_000_000
    assert (learner.feature_dim, learner.num_neighbors) == (5, 12)
    assert (learner.n_steps, learner.discount, learner.task_steps) == (10, 0.99, 10)
    assert (learner.learning_rate, learner.adam_epsilon) == (1e-4, 1.5e-4)
    assert (learner.batch_size, learner.target_period) == (32, 100)
    assert (learner.distance_offset, learner.distance_clip) == (1.0, 1e-4)
    assert config.pretrain.samples_per_step == 3.2
    assert config.finetune.finetune_agent_steps == 100_000
    assert config.finetune.infer_agent_steps == 40_000
    assert config.finetune.infer_episodes == 10
    assert config.evaluation.eval_episodes == 100
    assert config.evaluation.eval_epsilon == 0.001
    environment = config.environment
    assert (environment.noop_max, environment.sticky) == (30, 0.0)
    assert environment.max_frames == 108_000


def test_a_window_holds_its_targets_their_steps_and_its_history():
    learner = config_lib.AgentConfig(window_targets=4, n_steps=10, batch_size=32)
    assert (learner.num_windows, learner.window_states) == (8, 14)
    assert learner.window_length == 17


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_neighbors": 256}, "num_neighbors must be less than num_particles.*256"),
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
        ({"agent": "dqn"}, "agent must be one of aps, visr, apt, got 'dqn'"),
        ({"num_envs": 2.5}, "num_envs must be int, got 2.5"),
        ({"noop_max": 0}, "noop_max must be at least 1, got 0"),
        ({"colour": 1}, "no option 'colour'"),
    ],
)
def test_a_wrong_value_is_named_with_its_number(options, message):
    with pytest.raises(ValueError, match=message):
        config_lib.replace_options(config_lib.Config(), **options)


def test_the_unit_of_values_is_that_of_one_step():
    learner = config_lib.AgentConfig(discount=0.75)
    assert learner.value_unit == 0.25
    without = config_lib.AgentConfig(discount=1.0, unit_values=False)
    assert without.value_unit == 1.0


@pytest.mark.parametrize("form", config_lib.TD_FORMS)
def test_the_exploration_value_is_apart_in_two_forms(form):
    learner = config_lib.AgentConfig(td_form=form)
    assert learner.has_exploration_value == (form in ("off_policy", "split"))


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="smoke, cpu, gpu, paper, got 'tpu'"):
        config_lib.preset_config("tpu")


def test_naming_an_agent_sets_its_weights_unless_given():
    base = config_lib.Config()
    assert config_lib.replace_options(base, agent="visr").learner.entropy_weight == 0.0
    mixed = config_lib.replace_options(base, agent="visr", entropy_weight=0.5)
    assert (mixed.learner.skill_weight, mixed.learner.entropy_weight) == (1.0, 0.5)


@pytest.mark.parametrize("change", ["missing", "unknown", "section"])
def test_a_foreign_config_is_refused(change):
    values = config_lib.to_dict(config_lib.Config())
    if change == "missing":
        del values["learner"]["n_steps"]
    elif change == "unknown":
        values["learner"]["momentum"] = 0.9
    else:
        del values["learner"]
    names = {"missing": "n_steps", "unknown": "momentum", "section": "learner"}
    with pytest.raises(ValueError, match=names[change]):
        config_lib.from_dict(values)


def test_every_option_has_a_sentence():
    for name, (_, field) in config_lib.option_fields().items():
        assert re.fullmatch(r"[A-Z].{15,}\.", field.metadata["help"]), name


def test_every_option_is_read():
    """Each field is used somewhere outside of the module that declares it."""
    sources = "".join(
        path.read_text()
        for folder in ("aps_jax", "experiments")
        for path in pathlib.Path(__file__).parent.parent.joinpath(folder).glob("*.py")
        if path.name != "config.py"
    )
    own = pathlib.Path(config_lib.__file__).read_text()
    derived = set(re.findall(r"self\.(\w+)", own))
    for name in config_lib.option_fields():
        assert re.search(rf"\.{name}\b", sources) or name in derived, name


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_lib.Config().seed = 3
