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
from experiments import maze_agent, maze_evaluation, maze_grid

ROOT = pathlib.Path(__file__).parents[2]

CORRIDOR = ("S....",)


def random_window(rng, dim):
    """What follows an action, with numbers that mean nothing."""

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return maze_agent._Window(
        phi=draw(dim),
        r_entropy=draw(),
        discount=np.float32(rng.uniform()),
        psi=draw(1, dim),
        exploration=draw(1),
    )


def test_td_forms_match_their_equations():
    rng = np.random.default_rng(0)
    own, behaviour = random_window(rng, 3), random_window(rng, 3)
    psi_tm1, exploration_tm1 = np.float32(rng.normal(size=(1, 3))), np.ones(1)
    w = np.float32([0.6, 0.0, 0.8])
    fields = {"skill_weight": 0.7, "entropy_weight": 0.4}

    task = 0.7 * own.phi + own.discount * own.psi[0] - psi_tm1[0]
    both = task + 0.4 * own.r_entropy * w
    split = behaviour.phi + behaviour.discount * behaviour.psi[0] - psi_tm1[0]
    exploration = behaviour.r_entropy + behaviour.discount * behaviour.exploration[0]
    exploration = (exploration - exploration_tm1[0]) ** 2
    expected = {
        maze_agent.TDForm.SCALAR: (both @ w) ** 2,
        maze_agent.TDForm.VECTOR: both @ both,
        maze_agent.TDForm.SPLIT: split @ split + exploration,
        maze_agent.TDForm.OFF_POLICY: task @ task + exploration,
    }
    for form, square in expected.items():
        config = maze_agent.AgentConfig(td_form=form, **fields)
        found = maze_agent._td_error_square(
            psi_tm1, np.float32(exploration_tm1), own, behaviour, w, config=config
        )
        np.testing.assert_allclose(found, square, rtol=1e-4, err_msg=form)


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
def test_windows_follow_greedy_actions_through_what_was_met(num_steps):
    rng = np.random.default_rng(1)
    world = maze.parse_maze(("S..", ".#.", "..."))
    greedy = rng.integers(4, size=(9, 2))
    phi = np.float32(rng.normal(size=(9, 3)))
    r_entropy = np.float32(rng.normal(size=9))
    is_met = rng.uniform(size=(9, 4)) < 0.8
    predicted = modules.Successor(
        psi=jnp.asarray(rng.normal(size=(9, 2, 4, 3)), jnp.float32),
        exploration=jnp.asarray(rng.normal(size=(9, 2, 4)), jnp.float32),
    )
    window = maze_agent._follow(
        jnp.asarray(greedy),
        predicted,
        phi,
        r_entropy,
        world,
        jnp.asarray(is_met),
        num_steps,
        0.9,
    )
    for start, task in np.ndindex(9, 2):
        actions = greedy[:, task]
        phi_sum, r_sum, factor, cell = walk(
            world, actions, start, is_met, phi, r_entropy, num_steps, 0.9
        )
        found = jax.tree.map(lambda leaf, at=(start, task): leaf[at], window)
        np.testing.assert_allclose(found.phi, phi_sum + np.zeros(3), atol=1e-5)
        np.testing.assert_allclose(found.r_entropy, r_sum, atol=1e-5)
        np.testing.assert_allclose(found.discount, factor, rtol=1e-5)
        last = predicted.psi[cell, task, actions[cell]]
        np.testing.assert_array_equal(found.psi[0], last)
        last = predicted.exploration[cell, task, actions[cell]]
        assert found.exploration[0] == last


def test_a_step_is_put_before_a_window():
    window = random_window(np.random.default_rng(0), 2)
    longer = maze_agent._prepend(window, jnp.array([1.0, 2.0]), jnp.float32(3.0), 0.5)
    np.testing.assert_allclose(longer.phi, [1.0, 2.0] + 0.5 * window.phi, rtol=1e-6)
    np.testing.assert_allclose(longer.r_entropy, 3.0 + 0.5 * window.r_entropy)
    np.testing.assert_allclose(longer.discount, 0.5 * window.discount)


def test_heads_learn_the_successor_features_of_their_tasks():
    # In a corridor whose every move is soon met, the heads must come to value iteration.
    world = maze.parse_maze(CORRIDOR)
    config = maze_agent.AgentConfig(
        feature_dim=2, num_heads=4, num_envs=4, num_iterations=300, epsilon=0.5
    )
    learnt = jax.jit(maze_agent.make_pretrain(config))(jax.random.key(0), world)
    phi = maze_agent.feature_table(learnt.feature_params, world, config).phi
    for index, w in enumerate(learnt.tasks):
        exact = maze.optimal_action_values(
            world, jnp.matmul(phi, w), horizon=400, discount=config.discount
        )[-1]
        psi = learnt.successor_params.psi[:, index]
        values = jnp.sum(psi * w[None, None, :], axis=-1)
        np.testing.assert_allclose(values, (1 - config.discount) * exact, atol=0.02)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_envs": 0}, "num_envs must be positive, got 0"),
        ({"task_hold": 7}, "divide an episode of 40 steps, got 7"),
        ({"num_heads": -1}, "num_heads must be at least 0, got -1"),
        ({"num_steps": 4}, "1 more than a power of 2, got 4"),
        ({"num_neighbors": 300}, "at most the 256 particles, got 300"),
    ],
)
def test_bad_agent_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        maze_agent.AgentConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_rewards": 0}, "num_rewards must be positive, got 0"),
        ({"few_shot_episodes": 2}, "of 2 few-shot episodes 10"),
    ],
)
def test_bad_test_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        maze_evaluation.TestConfig(**fields)


def test_episodes_start_at_the_start_and_follow_the_greedy_action_of_each_task():
    world = maze.parse_maze(("..S..",))
    # Two environments, each with two tasks of two steps: left then right, and right
    # then bumping into the upper border.
    actions = jnp.array([[3, 1], [1, 0]])
    greedy = jnp.broadcast_to(actions, (5, 2, 2)).astype(jnp.int32)
    played = maze_agent._play(jax.random.key(0), world, greedy, 0.0, 4)
    np.testing.assert_array_equal(played.cell, [[2, 2], [1, 3], [0, 4], [1, 4]])
    np.testing.assert_array_equal(played.next_cell, [[1, 3], [0, 4], [1, 4], [2, 4]])
    np.testing.assert_array_equal(played.action, [[3, 1], [3, 1], [1, 0], [1, 0]])


def test_exploring_actions_are_uniform_and_as_frequent_as_epsilon():
    explores, actions = maze_agent.random_actions(jax.random.key(0), (40_000,), 0.25)
    # Standard deviations: 0.0022 of the share, 0.0022 of each action's.
    np.testing.assert_allclose(np.mean(explores), 0.25, atol=0.01)
    np.testing.assert_allclose(np.bincount(actions) / 40_000, 0.25, atol=0.01)


def test_random_visits_count_every_step_once():
    world = maze.parse_maze(maze.MAPS["comb"])
    config = maze_agent.AgentConfig(num_iterations=3)
    visits = maze_agent.random_visits(jax.random.key(0), world, config)
    np.testing.assert_array_equal(jnp.sum(visits, axis=1), 64 * 40)
    assert not np.any(np.asarray(visits)[:, ~np.asarray(world.is_free)])


def test_feature_bound_grows_with_the_features_to_one():
    world = maze.parse_maze(maze.MAPS["comb"])
    boxes = jnp.asarray(maze.box_masks(10, 10))
    rewards = jax.vmap(lambda key: maze.sample_reward(key, world, boxes))(
        jax.random.split(jax.random.key(0), 20)
    )
    few, more, all_of_them = [
        maze_evaluation.feature_bound(world, rewards, feature_dim=dim, horizon=40)
        for dim in (2, 8, 100)
    ]
    assert few < more < all_of_them
    np.testing.assert_allclose(all_of_them, 1.0, atol=1e-3)


def test_discount_bound_is_one_without_a_reason_to_hurry():
    # With a single rewarded cell at the end of a corridor, the way that is best for any
    # discount is best for 40 steps as well.
    world = maze.parse_maze(CORRIDOR)
    rewards = jnp.array([[0.0, 0.0, 0.0, 0.0, 1.0]])
    bound = maze_evaluation.discount_bound(world, rewards, discount=0.9, horizon=40)
    np.testing.assert_allclose(bound, 1.0)


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
    return {"agents": list(agents), "mazes": {"open": {}, "comb": {}}, "runs": runs}


@pytest.mark.parametrize("rewarded, is_seen", [(2, True), (4, False)])
def test_unseen_cells_cost_what_cannot_be_known(monkeypatch, rewarded, is_seen):
    """A corridor of five of which three were visited, one feature tells 2 and one 4."""
    world = maze.parse_maze(CORRIDOR)
    phi = np.eye(5, dtype=np.float32)[:, [2, 4]]
    monkeypatch.setattr(
        maze_agent, "feature_table", lambda *_: modules.Features(h=phi, phi=phi)
    )
    psi = jnp.zeros((5, 1, 4, 2))  # Indifferent: always the first action, which bumps.
    table = modules.Successor(psi=psi, exploration=jnp.zeros((5, 1, 4)))
    monkeypatch.setattr(maze_agent, "successor_table", lambda *_: table)
    visits = jnp.array([[3, 1, 0, 0, 0], [2, 1, 1, 0, 0]])
    nothing = jnp.zeros(2)
    result = maze_agent.Pretrained({}, {}, phi[2:3], visits, nothing, nothing)
    box = (jnp.arange(5)[None] == rewarded).astype(jnp.float32)
    config = maze_agent.AgentConfig(episode_length=40, feature_dim=2, num_heads=1)
    with jax.numpy_rank_promotion("allow"):
        found = maze_evaluation.unseen_cells(
            jax.random.key(0),
            world,
            box,
            result,
            config,
            maze_evaluation.TestConfig(num_rewards=3),
        )
    np.testing.assert_allclose(found.share, 0.4, rtol=1e-6)
    reward = 2.0 * box[0]
    at_random = maze.random_return(world, reward, horizon=40)
    best = maze.optimal_return(world, reward, horizon=40)
    bumping = float(-at_random / (best - at_random))
    np.testing.assert_allclose(found.acted, bumping, rtol=1e-4)
    if is_seen:
        known = [found.known, found.silent, found.believed]
        np.testing.assert_allclose(known, 1.0, rtol=1e-5)
    else:
        np.testing.assert_allclose(found.known, bumping, rtol=1e-4)


def test_summary_pools_the_runs_of_all_mazes():
    result = run_with([[0.0, 0.4], [0.6, 1.0]])
    aps, random = maze_grid.summarise(result)
    # The middle two of four runs: (0.4 + 0.6) / 2.
    assert aps["improved"][0] == 0.5
    assert aps["alone"][0] == 0.25
    assert aps["improved"][1] <= 0.5 <= aps["improved"][2]
    assert aps["per_maze"] == {"open": 0.2, "comb": 0.8}
    assert aps["cells_reached"] == 0.75
    assert random["improved"] == [0.0, 0.0, 0.0]


def test_table_shows_intervals_where_there_are_several_seeds():
    result = run_with([[0.5], [0.7]])
    result["table"] = maze_grid.summarise(result)
    table = maze_grid.format_table(result)
    expected = "| aps | 0.60 | 0.30 | 1.00 | 75% | 0.50 | 0.70 |"
    assert table.splitlines()[2] == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=unused", "open"], "Unexpected arguments: ['open']"),
        (["--workdir=unused", "--mazes=cellar"], "must name some of open, four_rooms"),
        (["--workdir=unused", "--agents=aps,aps"], "each once; got aps, aps"),
        (["--workdir=unused", "--set=gamma=1"], "no field 'gamma'"),
        (["--workdir=unused", "--set=num_envs=few"], "num_envs needs a whole number"),
        (["--workdir=unused", "--set=num_envs=0"], "num_envs must be positive, got 0"),
        (["--workdir=README.md"], "--workdir=README.md: [Errno 17] File exists"),
        ([], "--workdir"),
    ],
)
def test_bad_command_lines_are_refused_in_one_line(arguments, message):
    finished = run_script("maze", *arguments, timeout=300)
    assert finished.returncode == 1
    assert message in finished.stderr + finished.stdout
    assert "Traceback" not in finished.stderr


def test_short_run_learns_and_writes_everything(tmp_path):
    finished = run_script(
        "maze",
        f"--workdir={tmp_path}",
        "--mazes=open",
        "--agents=aps,random",
        # The sizes of the tutorial's command: what is compiled for one serves both.
        "--num_seeds=2",
        "--rewards=10",
        "--set=num_iterations=60",
        "--set=num_heads=16",
        "--set=feature_dim=20",
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    with open(tmp_path / "maze.json") as file:
        result = json.load(file)
    trained, other, random, _ = result["runs"]
    scores = [run["zero_shot"]["improved"][-1] for run in (trained, other)]
    # Random play scores 0. Seeds 0 to 19 of this very command: 0.42, 0.45, 0.56, 0.63,
    # 0.68, 0.69, 0.69, 0.70, 0.72, 0.73, 0.77, 0.78, 0.80, 0.82, 0.82, 0.87, 0.87, 0.91,
    # 0.91, 0.94; the two worst have a mean of 0.44.
    assert np.mean(scores) > 0.4
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
        "maze", f"--workdir={tmp_path}", "--mazes=open", "--agents=random"
    )
    assert refused.returncode == 1
    assert "differs in agent_config, agent_weights, test_config, seeds, agents" in (
        refused.stderr + refused.stdout
    )


def test_a_stop_ends_with_the_code_that_asks_to_be_run_again(tmp_path):
    command = [sys.executable, "-m", "experiments.maze", f"--workdir={tmp_path}"]
    with subprocess.Popen(
        [*command, "--set=num_iterations=1000000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert any("stopped and continued" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 75
    assert "SIGTERM noticed" in said and "the same command continues" in said


def test_a_grid_goes_on_after_its_last_maze():
    config = maze_agent.AgentConfig(feature_dim=2, num_heads=2, num_iterations=2)
    test_config = maze_evaluation.TestConfig(
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
    (both,) = maze_grid.run_grid(["open", "comb"], *settings, earlier)
    assert list(both["mazes"]) == ["open", "comb"]
    assert both["runs"][0] == before
    assert [run["maze"] for run in both["runs"]] == ["open", "comb"]
    assert both["wall_seconds"] > 5.0
    assert both["cpu_seconds"] > 7.0
    (again,) = maze_grid.run_grid(["open"], *settings, both)
    assert again == both


def test_pages_show_the_table_of_the_results():
    folder = ROOT / "results" / "maze"
    with open(folder / "maze.json") as file:
        result = json.load(file)
    table = maze_grid.format_table({**result, "table": maze_grid.summarise(result)})
    assert (folder / "table.md").read_text() == table
    for page in ("README.md", "docs/maze.md"):
        assert table in (ROOT / page).read_text()
