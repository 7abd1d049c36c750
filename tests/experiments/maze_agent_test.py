"""Tests of the maze experiment: its agent, its measurements, and the whole script."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import run_script

from aps_jax.envs import maze
from aps_jax.networks import modules
from aps_jax.ops import losses
from experiments.maze import agent, evaluation, grid

ROOT = pathlib.Path(__file__).parents[2]

CORRIDOR = ("S....",)


def library_error(form, table, index, w, phi, r_entropy, reached, config):
    """The library's TD error of one transition, of psi and the exploration value."""
    cell, head, action = index
    psi_tm1, psi_t = table.psi[cell, head], table.psi[reached, head]
    weights = {
        "skill_weight": config.skill_weight,
        "entropy_weight": config.entropy_weight,
    }
    unit, discount = np.float32(1 - config.discount), np.float32(config.discount)
    phi_t, r_t = unit * phi[reached], unit * r_entropy[reached]
    if form in ("split", "off_policy"):
        function = getattr(losses, f"{form}_td_error")
        values = (table.exploration[cell, head], action, phi_t, r_t, discount)
        ahead = (psi_t, table.exploration[reached, head], w)
        return function(psi_tm1, *values, *ahead, **weights)
    cumulant = config.skill_weight * phi_t + config.entropy_weight * r_t * w
    if form == "vector":
        return losses.vector_td_error(psi_tm1, action, cumulant, discount, psi_t, w), 0
    reward = jnp.sum(cumulant * w)
    error = losses.scalar_td_error(psi_tm1, action, reward, discount, psi_t, w)
    return error * w, 0


@pytest.mark.parametrize("form", ["off_policy", "split", "vector", "scalar"])
@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.0, 1.0)])
def test_errors_of_one_step_are_the_librarys(form, weights):
    config = agent.AgentConfig(
        td_form=form,
        skill_weight=weights[0],
        entropy_weight=weights[1],
        feature_dim=3,
        num_heads=2,
        num_steps=1,
    )
    world = maze.parse_maze(("S..", ".#.", "..."))
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 3)).astype(np.float32)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    phi = rng.normal(size=(9, 3)).astype(np.float32)
    r_entropy = rng.normal(size=9).astype(np.float32)
    exploration = None
    if form in ("split", "off_policy"):
        exploration = jnp.asarray(rng.normal(size=(9, 2, 4)), jnp.float32)
    psi = jnp.asarray(rng.normal(size=(9, 2, 4, 3)), jnp.float32)
    table = modules.Successor(psi=psi, exploration=exploration)
    is_met = jnp.ones((9, 4), bool)
    found = agent.td_errors(table, table, w, phi, r_entropy, world, is_met, config)
    for index in [(0, 0, 1), (2, 1, 2), (8, 0, 0), (3, 1, 3), (6, 0, 2)]:
        reached = int(world.next_cell[index[0], index[2]])
        index = (index[0], index[1], np.int32(index[2]))
        successor, value = library_error(
            form, table, index, w[index[1]], phi, r_entropy, reached, config
        )
        np.testing.assert_allclose(found.psi[index], successor, rtol=1e-4, atol=1e-5)
        if exploration is not None:
            np.testing.assert_allclose(found.exploration[index], value, rtol=1e-4)


def walk(world, greedy, start, is_met, phi, r_entropy, num_steps, discount):
    """Follows the greedy actions one by one; returns sums, discount and last cell."""
    phi_sum, r_sum, factor, cell = 0.0, 0.0, 1.0, start
    for _ in range(num_steps):
        if not is_met[cell, greedy[cell]]:
            break
        cell = int(world.next_cell[cell, greedy[cell]])
        phi_sum = phi_sum + factor * phi[cell]
        r_sum = r_sum + factor * r_entropy[cell]
        factor *= discount
    return phi_sum, r_sum, factor, cell


@pytest.mark.parametrize("num_steps", [0, 1, 2, 8])
def test_returns_follow_greedy_actions_through_what_was_met(num_steps):
    rng = np.random.default_rng(1)
    world = maze.parse_maze(("S..", ".#.", "..."))
    greedy = rng.integers(4, size=(9, 2))
    cumulant = np.float32(rng.normal(size=(9, 2, 3)))
    is_met = rng.uniform(size=(9, 4)) < 0.8
    values = np.float32(rng.normal(size=(9, 2, 4, 3)))
    found = agent.follow(
        jnp.asarray(greedy),
        jnp.asarray(cumulant),
        jnp.asarray(values),
        world,
        jnp.asarray(is_met),
        num_steps=num_steps,
        discount=0.9,
    )
    for start, task in np.ndindex(9, 2):
        total, factor, cell = np.zeros(3), 1.0, start
        for _ in range(num_steps):
            if not is_met[cell, greedy[cell, task]]:
                break
            cell = int(world.next_cell[cell, greedy[cell, task]])
            total = total + factor * cumulant[cell, task]
            factor *= 0.9
        expected = total + factor * values[cell, task, greedy[cell, task]]
        np.testing.assert_allclose(found[start, task], expected, atol=1e-5)


@pytest.mark.parametrize("name", agent.AGENTS)
def test_heads_learn_the_successor_features_of_their_tasks(name):
    # In a corridor all moves are soon met: the heads must come to value iteration, also
    # those of the agent that only explores.
    world = maze.parse_maze(CORRIDOR)
    skill_weight, entropy_weight = agent.AGENTS[name]
    config = agent.AgentConfig(
        skill_weight=skill_weight,
        entropy_weight=entropy_weight,
        feature_dim=2,
        num_heads=4,
        num_envs=4,
        num_iterations=300,
        epsilon=0.5,
    )
    learnt = jax.jit(lambda key: agent.pretrain(key, world, config))(jax.random.key(0))
    phi = agent.feature_table(learnt.feature_params, world, config).phi
    for index, w in enumerate(learnt.tasks):
        exact = maze.optimal_action_values(
            world, jnp.matmul(phi, w), horizon=400, discount=config.discount
        )[-1]
        values = jnp.sum(learnt.table.psi[:, index] * w[None, None, :], axis=-1)
        np.testing.assert_allclose(values, (1 - config.discount) * exact, atol=0.02)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
        ({"td_form": "best"}, "td_form must be one of"),
        ({"task_hold": 7}, "divide an episode of 40 steps, got 7"),
        ({"num_steps": 4}, "1 more than a power of 2, got 4"),
        ({"num_neighbors": 300}, "at most the 256 particles, got 300"),
    ],
)
def test_bad_agent_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        agent.AgentConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_rewards": 0}, "num_rewards must be positive, got 0"),
        ({"few_shot_episodes": 2}, "of 2 few-shot episodes 10"),
    ],
)
def test_bad_test_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        evaluation.TestConfig(**fields)


def test_episodes_start_at_the_start_and_follow_the_greedy_action_of_each_task():
    world = maze.parse_maze(("..S..",))
    # Two environments, each with two tasks of two steps: left then right, and right
    # then bumping into the upper border.
    actions = jnp.array([[3, 1], [1, 0]])
    greedy = jnp.broadcast_to(actions, (5, 2, 2)).astype(jnp.int32)
    played = agent.play(jax.random.key(0), world, greedy, epsilon=0.0, num_steps=4)
    np.testing.assert_array_equal(played.cell, [[2, 2], [1, 3], [0, 4], [1, 4]])
    np.testing.assert_array_equal(played.next_cell, [[1, 3], [0, 4], [1, 4], [2, 4]])
    np.testing.assert_array_equal(played.action, [[3, 1], [3, 1], [1, 0], [1, 0]])


def test_exploring_actions_are_uniform_and_as_frequent_as_epsilon():
    world = maze.parse_maze(("S",))
    greedy = jnp.zeros((1, 400, 1), jnp.int32)
    played = agent.play(jax.random.key(0), world, greedy, epsilon=0.4, num_steps=100)
    # Of 40,000 actions; standard deviations: 0.0015 of each share of 0.1.
    shares = np.bincount(np.ravel(played.action)) / 40_000
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.1, 0.1], atol=0.01)


def test_random_visits_count_every_step_once():
    world = maze.parse_maze(maze.MAPS["comb"])
    config = agent.AgentConfig(num_iterations=3)
    visits = agent.random_visits(jax.random.key(0), world, config)
    np.testing.assert_array_equal(jnp.sum(visits, axis=1), 64 * 40)
    assert not np.any(np.asarray(visits)[:, ~np.asarray(world.is_free)])


def run_with(scores, agents=("aps", "random")):
    """A result of two mazes with the given all-cells scores of APS `[2, R]`."""
    runs = [
        {
            "maze": name,
            "agent": agent,
            "seed": seed,
            "cells_reached": [0.5, 0.75],
            "zero_shot": {
                "improved": [0.0, score],
                "alone": [0.0, score / 2],
                "bound": [0.0, 1.0],
            },
        }
        for name, row in zip(("open", "comb"), scores, strict=True)
        for agent in agents
        for seed, score in enumerate(row)
    ]
    mazes = {"open": {}, "comb": {}}
    sizes = [10, "all"]
    return {"agents": list(agents), "mazes": mazes, "runs": runs, "sample_sizes": sizes}


def test_zero_shot_of_known_features_is_optimal(monkeypatch):
    """One feature tells cell 2 and one cell 4, which alone is rewarded."""
    world = maze.parse_maze(CORRIDOR)
    phi = jnp.eye(5)[:, jnp.array([2, 4])]
    monkeypatch.setattr(
        agent, "feature_table", lambda *_: modules.Features(h=phi, phi=phi)
    )
    # Of two policies one bumps for ever; the other goes right, to cell 4, and stays.
    going = np.zeros((5, 4, 2), np.float32)
    going[:, 1, 1] = 1.0
    psi = jnp.stack([jnp.zeros((5, 4, 2)), going], axis=1)
    result = agent.Pretrained(
        feature_params={},
        table=modules.Successor(psi=psi, exploration=None),
        tasks=jnp.asarray([-phi[4], phi[4]]),
        visits=jnp.full((1, 5), 8.0),
    )
    box = jnp.eye(5)[4:]
    config = agent.AgentConfig(feature_dim=2, num_heads=2)
    test_config = evaluation.TestConfig(num_rewards=3, sample_sizes=(50, 100))
    asked = (jax.random.key(0), world, box, result, config, test_config)
    with jax.numpy_rank_promotion("allow"):
        scores, example = evaluation.zero_shot(*asked)
    np.testing.assert_allclose(scores.improved, 1.0, rtol=1e-5)
    np.testing.assert_allclose(scores.alone, 1.0, rtol=1e-5)
    np.testing.assert_allclose(scores.bound, 1.0, rtol=1e-5)
    np.testing.assert_array_equal(example.reward, 2 * box[0])
    np.testing.assert_array_equal(example.policy, 1)


def test_fine_tuning_learns_from_what_it_meets(monkeypatch):
    """From an empty psi; without pretraining the task is inferred but once."""
    world = maze.parse_maze(CORRIDOR)
    phi = jnp.eye(5)
    monkeypatch.setattr(
        agent, "feature_table", lambda *_: modules.Features(h=phi, phi=phi)
    )
    table = modules.Successor(psi=jnp.zeros((5, 2, 4, 5)), exploration=None)
    config = agent.AgentConfig(feature_dim=5, num_heads=2, epsilon=0.8)
    test_config = evaluation.TestConfig(few_shot_rewards=2, few_shot_updates=30)
    with jax.numpy_rank_promotion("allow"):
        curve = evaluation.few_shot(
            jax.random.key(0),
            world,
            jnp.asarray(phi[4:]),
            {},
            table,
            config,
            test_config,
            is_pretrained=False,
        )
    chex.assert_shape(curve, (31,))
    # Zeros are greedy in bumping for ever, below random play, up to the tenth episode.
    assert np.all(curve[:10] < 0)
    np.testing.assert_allclose(curve[-1], 1.0, rtol=1e-5)


def test_summary_pools_the_runs_of_all_mazes():
    result = run_with([[0.0, 0.4], [0.6, 1.0]])
    aps, random = grid.summarise(result)
    # The middle two of four runs: (0.4 + 0.6) / 2.
    assert aps["improved"][0] == 0.5
    assert aps["alone"][0] == 0.25
    assert aps["improved"][1] <= 0.5 <= aps["improved"][2]
    assert aps["per_maze"] == {"open": 0.2, "comb": 0.8}
    assert aps["cells_reached"] == 0.75
    assert random["improved"] == [0.0, 0.0, 0.0]


def test_table_shows_intervals_where_there_are_several_seeds():
    result = run_with([[0.5], [0.7]])
    result["table"] = grid.summarise(result)
    table = grid.format_table(result)
    assert table.splitlines()[2] == "| aps | 0.60 | 0.30 | 1.00 | 75% | 0.50 | 0.70 |"
    assert table.splitlines()[-2] == "| aps, zero-shot | 0.00 | 0.60 |"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mazes=cellar"], "--mazes must name some of open, four_rooms"),
        (["--maze_agents=aps,aps"], "each once; got aps, aps"),
        (["--batch_size=8"], "--batch_size: no option of the maze's agent"),
        (["--num_envs=0"], "num_envs must be at least 1, got 0"),
        (["--workdir=README.md"], "--workdir=README.md: [Errno 17] File exists"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(arguments, message):
    finished = run_script("maze", "--workdir=unused", *arguments, timeout=300)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert message in line
    assert not (ROOT / "unused").exists()


def test_scripts_share_their_flags():
    scripts = ("maze", "maze.ablation", "benchmark", "pretrain", "sweep", "report")
    program = "import " + ", ".join(f"experiments.{name}" for name in scripts)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_short_run_learns_and_writes_everything(tmp_path):
    finished = run_script(
        "maze",
        f"--workdir={tmp_path}",
        "--mazes=open",
        "--maze_agents=aps,random",
        # The sizes of the tutorial's command: what is compiled for one serves both.
        "--num_seeds=2",
        "--rewards=10",
        "--num_iterations=60",
        "--num_heads=16",
        "--feature_dim=20",
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    with open(tmp_path / "maze.json") as file:
        result = json.load(file)
    trained, other, random, _ = result["runs"]
    scores = [run["zero_shot"]["improved"][-1] for run in (trained, other)]
    assert np.mean(scores) > 0.4  # Random play scores 0.
    assert trained["cells_reached"][-1] >= random["cells_reached"][-1]
    assert sum(trained["visits"]) == 60 * 64 * 40
    assert {name for name in os.listdir(tmp_path) if name.endswith(".png")} == {
        "visits.png",
        "coverage.png",
        "transfer.png",
        "samples.png",
        "few_shot.png",
        "tasks.png",
    }
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("| agent | zero-shot |")
    assert table in finished.stdout
    chex.assert_shape(np.array(trained["few_shot"]), (31,))

    refused = run_script(
        "maze", f"--workdir={tmp_path}", "--mazes=open", "--maze_agents=random"
    )
    assert refused.returncode == 2
    assert "differs in agent_config, agent_weights, test_config, seeds, agents" in (
        refused.stderr
    )


def test_a_stop_ends_with_the_code_that_asks_to_be_run_again(tmp_path):
    command = [sys.executable, "-m", "experiments.maze", f"--workdir={tmp_path}"]
    with subprocess.Popen(
        [*command, "--num_iterations=1000000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert any("stopped between" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 75
    assert "SIGTERM noticed" in said and "the same command continues" in said


def test_a_grid_goes_on_after_its_last_maze():
    config = agent.AgentConfig(feature_dim=2, num_heads=2, num_iterations=2)
    test_config = evaluation.TestConfig(
        num_rewards=1, few_shot_rewards=1, few_shot_inference_episodes=1
    )
    settings = ["random"], [0], config, test_config
    before = {"maze": "open", "agent": "random", "seed": 0}
    earlier = {
        "mazes": {"open": {"map": []}},
        "runs": [before],
        "wall_seconds": 5.0,
        "cpu_seconds": 7.0,
    }
    (both,) = grid.run_grid(["open", "comb"], *settings, earlier)
    assert list(both["mazes"]) == ["open", "comb"]
    assert both["runs"][0] == before
    assert [run["maze"] for run in both["runs"]] == ["open", "comb"]
    assert both["wall_seconds"] > 5.0
    assert both["cpu_seconds"] > 7.0
    (again,) = grid.run_grid(["open"], *settings, both)
    assert again == both
