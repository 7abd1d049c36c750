"""Tests of experiments.cost and its formulas, by hand and against XLA's own counts."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from aps_jax import agent as agent_lib
from aps_jax import config as config_lib
from aps_jax import loop, replay, report_tables
from experiments import cost, cost_model

GPU = config_lib.preset_config("gpu")


def test_an_encoder_by_hand():
    """Mnih's: 84 -> 20 -> 9 -> 7 pixels."""
    layers, width = cost_model.encoder_layers(GPU.learner)
    assert [layer.flops for layer in layers] == [
        2 * 20 * 20 * (8 * 8 * 4) * 32,
        2 * 9 * 9 * (4 * 4 * 32) * 64,
        2 * 7 * 7 * (3 * 3 * 64) * 64,
        2 * (7 * 7 * 64) * 512,
    ]
    assert width == 512


@pytest.mark.parametrize("encoder", config_lib.ENCODERS)
def test_operations_of_an_encoder_are_those_that_xla_counts(encoder, monkeypatch):
    # As accelerators compute it: a CPU's chunks are loops, which XLA counts once.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = config_lib.replace_options(GPU, encoder=encoder, bfloat16=False)
    module = agent_lib.make_encoder(config.learner)
    pixels = jax.ShapeDtypeStruct((1, 84, 84, 4), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), pixels)

    def forward(params, pixels):
        return module.apply(params, pixels).sum()

    layers, _ = cost_model.encoder_layers(config.learner)
    for function, expected in (
        (forward, cost_model.forward_flops(layers)),
        (jax.value_and_grad(forward), cost_model.both_flops(layers)),
    ):
        counted = jax.jit(function).lower(params, pixels).cost_analysis()["flops"]
        # Activations and sums are not in ours.
        assert 0.97 < expected / counted < 1.0


def test_operations_of_an_update_are_those_that_xla_counts(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = config_lib.replace_options(
        GPU, batch_size=6, window_targets=2, num_particles=16, n_steps=3
    )
    agent = agent_lib.make_agent(config.learner, config.finetune, num_actions=6)
    ring = replay.make_replay(num_envs=4, size=400, feature_dim=5)
    sample = loop.make_sample(
        ring, config.learner, jax.random.key(0), with_particles=True
    )
    drawn = jax.eval_shape(
        lambda state: sample.drawn(state, 0), jax.eval_shape(ring.init)
    )
    state = jax.eval_shape(agent.init, jax.random.key(0))

    @jax.jit
    def update(state, windows, particles):
        encoded = agent.particles(state.params, particles)
        return agent.update(state, windows, encoded)

    analysis = update.lower(state, drawn["windows"], drawn["particles"]).cost_analysis()
    # Adam's part, which does not depend on the batch: 3.6e6 parameters, 0.96e9 in all.
    optimiser = 30 * cost_model.num_parameters(config.learner, 6)
    expected = cost_model.update_flops(config.learner, 6)
    assert 0.97 < expected / (analysis["flops"] - optimiser) < 1.03


@pytest.mark.parametrize(
    "options", [{}, {"encoder": "paper", "td_form": "vector"}, {"encoder": "small"}]
)
def test_parameters_are_those_of_an_agent(options):
    config = config_lib.replace_options(GPU, **options)
    agent = agent_lib.make_agent(config.learner, config.finetune, num_actions=6)
    params = jax.eval_shape(agent.init, jax.random.key(0)).params
    learned = {name: params[name] for name in ("features", "successor")}
    assert cost_model.num_parameters(config.learner, 6) == sum(
        x.size for x in jax.tree.leaves(learned)
    )


def test_traffic_by_hand():
    traffic = cost_model.update_traffic(GPU.learner, num_actions=6, num_devices=8)
    # 1,024 particles of 5 features and an id; 8 x 4 tasks of 5 numbers.
    assert traffic.gathered == 4 * (1024 * 6 + 8 * 4 * 5)
    assert traffic.summed_early == 4 * (5 + 3)
    assert traffic.summed == 4 * (3_654_505 + 5 + 17)
    small = cost_model.Traffic(gathered=40, summed_early=8, summed=80)
    # Three quarters of 40, and twice three quarters of 88.
    assert cost_model.sent_bytes(small, 4) == 162.0
    # 162 bytes at 81 a second, and 5 x 2 messages of half a second.
    seconds = cost_model.network_seconds(small, 4, bandwidth=81.0, hop_seconds=0.5)
    assert seconds == 2.0 + 5.0
    assert cost_model.sent_bytes(small, 1) == 0.0


MACHINE = cost_model.Machine(
    targets_per_second=1024.0,
    steps_per_core=100.0,
    cores=4.0,
    devices_per_host=8,
    link=1e12,
    network=1e12,
    transfer=1e12,
    hop_seconds=0.0,
    least_targets=64,
)


def replaced(**values):
    return dataclasses.replace(MACHINE, **values)


def test_a_run_by_hand():
    config = config_lib.replace_options(
        GPU,
        pretrain_frames=4 * 148_000,
        warmup_agent_steps=20_000,
        finetune_agent_steps=40_000,
        infer_agent_steps=8_000,
        finetune_num_envs=2,
        max_frames=4 * 1000,
        evaluations=2,
        eval_episodes=10,
    )
    assert cost_model.steps_per_update(config) == 128.0
    run = cost_model.run_cost(config, MACHINE)
    # 128,000 steps / 128 = 1,000 updates at 1 a second; 148,000 steps at 400 a second
    # take 370 seconds beside them.
    assert run.pretrain_hours == pytest.approx(1000 / 3600)
    # 32,000 x 32 / 1,024 = 1,000 updates, and 40,000 steps on two of the cores.
    assert run.finetune_hours == pytest.approx((1000 + 200) / 3600)
    # 2 x 10 games of 1,000 steps at 400 a second.
    assert run.evaluate_hours == pytest.approx(50 / 3600)
    assert run.core_hours == pytest.approx((1480 + 400 + 200) / 3600)
    assert run.device_hours == pytest.approx((1000 + 1200 + 50) / 3600)
    # With a tenth of the cores the emulators are the slower part: 3,700 seconds.
    slow = cost_model.run_cost(config, replaced(cores=0.4))
    assert slow.pretrain_hours == pytest.approx(3700 / 3600)


def limits(machine, num_devices, config=GPU):
    return cost_model.limits(config, machine, num_devices, num_actions=6)


@pytest.mark.parametrize(
    "scarce, first",
    [
        ({}, "device"),
        ({"cores": 1.0}, "emulators"),
        ({"link": 1e6}, "network"),
        ({"hop_seconds": 0.1}, "network"),
        ({"transfer": 1e3}, "transfer"),
    ],
)
def test_the_scarce_resource_is_the_first_to_run_out(scarce, first):
    assert limits(replaced(**scarce), 4).first == first


def test_limits_by_hand():
    # 256 targets for each of 4 devices, at 1,024 a second.
    assert limits(MACHINE, 4).device == 4.0
    # 16 of each of 64, but no update is faster than one of 64.
    assert limits(MACHINE, 64).device == 16.0
    # 4 x 4 cores play 1,600 steps a second, 128 for each update.
    assert limits(MACHINE, 4).emulators == 12.5
    # 128 steps of 7,056 + 4 + 3 + 4 + 128 + 4 bytes.
    assert limits(replaced(transfer=7199.0 * 128), 1).transfer == 1.0
    # The slower network counts where devices are on several hosts.
    slow = replaced(network=1e6)
    assert limits(slow, 8).network == limits(MACHINE, 8).network
    assert limits(slow, 16).network < limits(MACHINE, 16).network
    alone = limits(MACHINE, 1)
    assert alone.network == math.inf and alone.together == 1.0
    # The network's time adds to the device's.
    both = cost_model.Limits(2.0, 9.0, 2.0, 9.0, math.inf)
    assert both.together == 1.0 and both.first == "device"
    # 256 windows cannot be shared by 512 devices.
    none = limits(MACHINE, 512)
    assert (none.first, none.together) == ("windows", 0.0)
    scaled = cost_model.times_batch(GPU, 512)
    assert limits(MACHINE, 512, scaled).device == 1.0
    assert limits(MACHINE, 512, scaled).emulators == 4 * 100 / 128


def test_a_device_holds_its_share_of_the_replay():
    ring, agent = cost_model.device_bytes(GPU, num_actions=6, num_devices=8)
    # 128 environments hold 7,812 steps each.
    assert ring == 7812 * 128 / 8 * 7091
    assert agent == 20 * 3_654_505


@pytest.fixture
def parsed_flags():
    with flagsaver.flagsaver():
        flags.FLAGS(["cost", "--preset=gpu"])
        yield


@pytest.mark.usefixtures("parsed_flags")
def test_the_script_prints_what_its_flags_say(tmp_path, capsys):
    benchmark = tmp_path / "benchmark.json"
    row = {"row": cost._RAW[0], "case": cost._RAW[1], "limit": 30_000.0}
    machine = {"cores": 12, "cpu": "Z80", "utc": "now", "commit": "abc"}
    benchmark.write_text(json.dumps({"machine": machine, "rows": [row]}))
    with flagsaver.flagsaver(
        benchmark=str(benchmark),
        updates_per_second=["100"],
        num_games=2,
        seeds=["3"],
        pretrain_frames=4_000_000,
    ):
        cost.main(["cost"])
    said = capsys.readouterr().out
    assert "2,500" in said and "30,000 agent steps/s on 12 cores of Z80" in said
    assert "2 games x 3 seeds x 4,000,000 frames" in said
    assert "100 (assumed)" in said and "200 (assumed)" not in said
    with flagsaver.flagsaver(env_rate_per_core=1234.0):
        cost.main(["cost"])
    assert "given (`--env_rate_per_core`)" in capsys.readouterr().out


@pytest.mark.usefixtures("parsed_flags")
@pytest.mark.parametrize(
    "name, value, words",
    [
        ("updates_per_second", ["fast"], "updates_per_second must be positive"),
        ("updates_per_second", ["0"], "updates_per_second must be positive"),
        ("cores_per_device", 0.0, "cores_per_device must be positive, got 0"),
        ("benchmark", __file__, "is no benchmark with the row acting"),
    ],
)
def test_wrong_inputs_are_refused(name, value, words):
    with flagsaver.flagsaver(**{name: value}), pytest.raises(ValueError, match=words):
        cost.main(["cost"])


def test_every_figure_says_where_it_comes_from():
    inputs, *calculated = cost.default_tables()
    sources = [row[-1] for row in inputs.rows]
    kinds = ("measured", "assumed", "data sheet", "given")
    assert all(source.startswith(kinds) for source in sources)
    assert sum(source.startswith("measured") for source in sources) == 1
    for table in calculated:
        assert "calculated" in table.title and "measured" not in str(table)
        assert report_tables.markdown_table(table)
