"""Tests of the maze's ablation: its changes, its table, and the script's flags."""

import json

import pytest
from scripts import run_script

from aps_jax.envs import maze
from experiments.maze import ablation, agent


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--changes=gamma=1", "--changes must name some of none"),
        ("--num_heads=4", "give no option beside"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, argument, message):
    folder = tmp_path / "a"
    finished = run_script("maze.ablation", f"--workdir={folder}", argument)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert message in line
    assert not folder.exists()


def test_a_run_goes_on_after_its_last_change_and_writes_the_table(tmp_path):
    """Both changes were measured before: they are not measured again."""
    before = [
        {
            "change": change,
            "maze": name,
            "seed": seed,
            "improved": 0.5 + 0.25 * seed,
            "alone": 0.25,
            "bound": 1.0,
            "unseen_share": 0.25,
        }
        for change in ("none", "num_heads=8")
        for name in maze.MAPS
        for seed in (0, 1)
    ]
    earlier = {"schema": 2, "seeds": [0, 1], "num_rewards": 2, "runs": before}
    (tmp_path / "ablation.json").write_text(json.dumps(earlier))
    flags = [f"--workdir={tmp_path}", "--num_seeds=2"]
    changes = "--changes=none,num_heads=8"
    finished = run_script("maze.ablation", *flags, "--rewards=2", changes)
    assert finished.returncode == 0, finished.stderr
    assert "| `num_heads=8` | 0.62 [" in finished.stdout
    assert finished.stdout.count("| none | ") == 1
    assert " | 75% |\n" in finished.stdout
    refused = run_script("maze.ablation", *flags, "--rewards=3", changes)
    assert refused.returncode == 2
    assert "holds a run that differs in num_rewards" in refused.stderr


def test_every_change_changes_one_option():
    default = vars(agent.AgentConfig())
    for name, options in ablation.CHANGES.items():
        changed = vars(agent.AgentConfig(**options))
        differing = [key for key in default if changed[key] != default[key]]
        assert [f"{key}={changed[key]}" for key in differing] == [name]
