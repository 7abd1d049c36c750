"""Golden values: what each agent learns on the chain, to be reproduced by a redesign.

They pin 20 reward-free updates and the fine-tuning that follows, on planes: norms and
projections of all parameters, every row, both results. `python
tests/agents/golden_test.py` (with the root and `tests` in PYTHONPATH) writes them anew,
after a change that is meant to alter learning curves (marked [learning] in the
changelog).
"""

import json
import pathlib
import sys
import tempfile

import fakes
import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from aps_jax.runs import metrics
from aps_jax.train import stages

_FOLDER = pathlib.Path(__file__).parent / "golden"
_AGENTS = ("aps", "visr", "entropy")
_TIMES = ("wall_seconds", "frames_per_second", "git_commit", "init")


def measure(agent, folder):
    """Runs both stages on the chain; returns parameters, rows and results as JSON."""
    config = config_lib.replace_options(
        config_lib.preset_config("smoke", agent),
        game=fakes.PLANES,
        encoder="mlp",
        # Features of full rank in every batch, else rounding decides what is learned.
        feature_dim=3,
        num_particles=64,
        # Greedy actions hang on rounding after some updates.
        pretrain_epsilon=1.0,
        pretrain_frames=4 * 400,
        replay_size=240,
        warmup_agent_steps=80,
        report_agent_steps=80,
        checkpoint_agent_steps=1000,
        finetune_agent_steps=240,
        infer_agent_steps=120,
    )
    constructor = {"constructor": fakes.PlanesPool}
    results = {
        "pretrain": stages.pretrain(config, folder / "pretrain", **constructor),
        "finetune": stages.finetune(
            config, folder / "finetune", folder / "pretrain", **constructor
        ),
    }
    assert results["pretrain"]["updates"] == 20
    states = {
        "pretrain": stages.load_pretrained(folder / "pretrain").state,
        "finetune": stages.load_finetuned(folder / "finetune").state,
    }
    return {
        stage: {
            "params": {
                name: _projections(states[stage].params[name])
                for name in ("features", "successor")
            },
            "result": {
                name: value
                for name, value in results[stage].items()
                if name not in _TIMES
            },
            "rows": metrics.read_metrics(folder / stage / "metrics.csv"),
        }
        for stage in results
    }


def _projections(params):
    """Returns, for each array, its norm and its products with three random vectors."""
    values = []
    for index, leaf in enumerate(jax.tree.leaves(jax.device_get(params))):
        directions = np.random.default_rng(index).normal(size=(3, leaf.size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        flat = np.float64(leaf.reshape(-1))
        values.append([float(np.linalg.norm(flat)), *(directions @ flat).tolist()])
    return values


def assert_close(found, golden, where=""):
    """Compares trees of JSON values, numbers to 1e-5."""
    if isinstance(golden, dict):
        assert sorted(found) == sorted(golden), where
        for name in golden:
            assert_close(found[name], golden[name], f"{where}.{name}")
    elif isinstance(golden, list) and golden and not isinstance(golden[0], float | int):
        assert len(found) == len(golden), where
        for index, value in enumerate(golden):
            assert_close(found[index], value, f"{where}[{index}]")
    elif isinstance(golden, str | bool | None):
        assert found == golden, where
    else:
        np.testing.assert_allclose(
            np.array(found, float),
            np.array(golden, float),
            rtol=1e-5,
            atol=1e-5,
            err_msg=where,
        )


@pytest.mark.parametrize("agent", _AGENTS)
def test_both_stages_reproduce_the_golden_values(agent, tmp_path):
    golden = json.loads((_FOLDER / f"{agent}.json").read_text())
    found = json.loads(json.dumps(measure(agent, tmp_path)))
    assert_close(found, golden)


if __name__ == "__main__":
    for name in sys.argv[1:] or _AGENTS:
        with tempfile.TemporaryDirectory() as place:
            text = json.dumps(measure(name, pathlib.Path(place)), indent=1)
        (_FOLDER / f"{name}.json").write_text(text + "\n")
