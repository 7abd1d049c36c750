"""Tests of the maze's ablation: its settings, its tables, and the script's flags."""

import json
import pathlib
import subprocess
import sys

import pytest
from scripts import run_script

from aps_jax.envs import maze

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--changes=gamma=1", "--changes: no field 'gamma'"),
        ("--changes=num_heads=few", "num_heads needs a whole number"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, argument, message):
    folder = tmp_path / "a"
    finished = run_script("maze_ablation", f"--workdir={folder}", argument)
    said = finished.stderr + finished.stdout
    assert finished.returncode == 1
    assert message in said
    assert "Traceback" not in said
    assert not folder.exists()


def test_a_run_goes_on_after_its_last_change_and_writes_both_tables(tmp_path):
    """One change was measured before: it is not measured again."""
    zero = dict.fromkeys(("known", "silent", "believed", "acted"), 0.25)
    before = [
        {
            "change": change,
            "maze": name,
            "seed": seed,
            "improved": 0.5 + 0.25 * seed,
            "alone": 0.25,
            "bound": 1.0,
            "unseen_share": 0.25,
            **{f"unseen_{field}": value for field, value in zero.items()},
        }
        for change in ("", "num_heads=8")
        for name in maze.MAPS
        for seed in (0, 1)
    ]
    earlier = {"schema": 1, "seeds": [0, 1], "num_rewards": 2, "runs": before}
    (tmp_path / "ablation.json").write_text(json.dumps(earlier))
    flags = [f"--workdir={tmp_path}", "--first_seed=0", "--num_seeds=2"]
    changes = "--changes=,num_heads=8"
    finished = run_script("maze_ablation", *flags, "--rewards=2", changes)
    assert finished.returncode == 0, finished.stderr
    assert "| `num_heads=8` | 0.62 [" in finished.stdout
    assert finished.stdout.count("| none | ") == 2
    assert " | 75% |\n" in finished.stdout
    assert "| none | 25% | 0.25 [0.25, 0.25] |" in finished.stdout
    refused = run_script("maze_ablation", *flags, "--rewards=3", changes)
    assert refused.returncode == 1
    assert "holds a run that differs in num_rewards" in refused.stdout + refused.stderr


# In a process of its own, like the script.
_EACH_CHANGE = """
from experiments import maze_ablation, maze_agent
default = vars(maze_agent.AgentConfig())
for change in maze_ablation.CHANGES:
    agent, test = maze_ablation.configs_of(change, 3)
    differing = [name for name in default if vars(agent)[name] != default[name]]
    assert len(differing) == (change not in ("", "intercept=false")), change
    assert test.intercept == (change != "intercept=false"), change
    assert test.num_rewards == 3
"""


def test_every_change_changes_one_field():
    subprocess.run([sys.executable, "-c", _EACH_CHANGE], cwd=ROOT, check=True)
