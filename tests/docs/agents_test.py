"""Tests that the agent of docs/agents.md learns as it says, and trains as any other."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.agents import AGENTS, base, dqn
from aps_jax.envs import atari
from aps_jax.replay.buffer import Window

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "agents.md").read_text()

# The table of agents is read when the config is imported, so this has its own process.
PROGRAM = """
import json, pathlib, sys
import fakes, q_learning
from aps_jax.agents import AGENTS
AGENTS["q_learning"] = q_learning.Q_LEARNING
from aps_jax import config as config_lib
from aps_jax.train import stages

workdir = pathlib.Path(sys.argv[1])
config = config_lib.replace_options(
    config_lib.preset_config("smoke", "q_learning"), huber_delta=0.5, evaluations=1
)
result = stages.finetune(config, workdir, None, constructor=fakes.ChainPool)
print(json.dumps({**result, "having": config_lib.agents_with("huber_delta")}))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The file that the page tells its reader to save."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    path = tmp_path_factory.mktemp("agent") / "q_learning.py"
    path.write_text(code)
    return path


@pytest.fixture
def q_learning(path, monkeypatch):
    spec = importlib.util.spec_from_file_location("q_learning", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "q_learning", module)
    spec.loader.exec_module(module)
    return module


def random_windows(num_windows):
    rng = np.random.default_rng(0)
    shape = (num_windows, 2)
    return Window(
        observation=rng.integers(0, 256, (*shape, 84, 84, 4), dtype=np.uint8),
        action=rng.integers(0, 3, shape).astype(np.int32),
        reward=rng.normal(size=shape).astype(np.float32) * 2,
        terminated=rng.random(shape) < 0.3,
        is_first=rng.random(shape) < 0.3,
        life_lost=np.zeros(shape, bool),
        id=np.arange(2 * num_windows, dtype=np.int32).reshape(shape),
        extras={},
    )


def test_with_a_new_target_network_it_learns_what_double_dqn_learns(q_learning):
    """Both choose the next action by the same network then, and sum one step.

    With this rate and epsilon a step of Adam's is about as large as the gradient.
    """
    values = {"encoder": "small", "hidden_units": 16, "batch_size": 32, "n_steps": 1}
    values |= {"learning_rate": 1.0, "adam_epsilon": 1.0}
    batch = base.Batch(jax.tree.map(jnp.asarray, random_windows(32)), None)
    learned = []
    for agent in (
        q_learning.make(
            q_learning.Config(**values, huber_delta=16.0), 3, atari.OBSERVATION
        ),
        dqn.make(dqn.Config(**values), 3, atari.OBSERVATION),
    ):
        state = jax.jit(agent.init)(jax.random.key(0))
        update = jax.jit(agent.finetune.learner.update)
        state, metrics, _ = update(state, batch, jax.random.key(1))
        learned.append((state.params, metrics))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *learned)


def test_it_trains_as_any_other_agent(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{path.parent}"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["agent"] == "q_learning"
    assert result["having"] == ["q_learning"]
    assert result["updates"] > 0
    assert len(result["returns"]) == 2
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert {"loss_td", "td_error", "q_value"} < set(header.split(","))


def test_the_page_names_each_agent():
    table = PAGE.split("## What an agent is")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", table, flags=re.MULTILINE)
    assert re.findall(r"`(\w+)`", ", ".join(cells)) == [*AGENTS]


def test_the_page_names_each_type():
    table = PAGE.split("## What an agent is")[1].split("## A complete example")[0]
    for name in re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE):
        assert isinstance(getattr(base, name), type), name
