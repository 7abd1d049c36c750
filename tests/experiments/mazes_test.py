"""Tests of experiments.mazes: what the arms change, what it writes, how it goes on."""

import json

import numpy as np
import pytest
from scripts import set_flags

from aps_jax import agents
from aps_jax.envs import maze
from aps_jax.train import stages
from experiments import arms, mazes

pytestmark = pytest.mark.usefixtures("parsed_flags")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(mazes, "_NUM_REWARDS", 2)
    monkeypatch.setattr(mazes, "_VISITED_STEPS", 640)


def test_it_writes_scores_tables_and_pictures_and_goes_on(
    tmp_path, small, monkeypatch, capsys
):
    options = {
        "pretrain_frames": 640,
        "warmup_agent_steps": 320,
        "hidden_units": 16,
        "feature_dim": 4,
        "num_particles": 16,
        "skill_steps": 8,
        "report_agent_steps": 160,  # rows without a checkpoint, and so without skills
        "replay_size": 640,
    }
    set_flags(workdir=str(tmp_path), mazes=["comb"], maze_arms=["random play"])
    set_flags(seeds=["0", "1"], **options)
    mazes.main(["mazes"])
    written = json.loads((tmp_path / "report" / "scores.json").read_text())
    rows = written["comb"]["random play"]
    assert len(rows) == 2 and rows[0] != rows[1]
    assert sum(rows[0]["visits"]) == 640
    assert 0.0 < rows[0]["coverage"] <= 1.0
    assert rows[0]["curve"]["agent_steps"] == [640.0]
    assert rows[0]["curve"]["skill_following"] == [rows[0]["skill_following"]]
    assert rows[0]["zero_shot"] <= 1.0 and "labels_10" in rows[0]
    assert (tmp_path / "report" / "visits.png").stat().st_size > 1_000
    assert (tmp_path / "report" / "skill_following.png").exists()
    shown = capsys.readouterr().out
    mean = np.mean([row["zero_shot"] for row in rows])
    assert "comb" in shown and f"{mean:.2f} [" in shown
    report = (tmp_path / "report" / "report.md").read_text()
    assert f"{mean:.2f} [" in report and "## comb" in report

    # What is finished is read, not run.
    monkeypatch.setattr(mazes, "score", None)
    monkeypatch.setattr(stages, "_explore", None)
    mazes.main(["mazes"])
    assert json.loads((tmp_path / "report" / "scores.json").read_text()) == written

    # And what was run with other values is not taken for it.
    set_flags(n_steps=2)
    with pytest.raises(ValueError, match="n_steps"):
        mazes.main(["mazes"])


def test_arms_differ_in_their_own_options_alone(tmp_path):
    set_flags(mazes=["comb"], maze_arms=list(arms.ARMS), pretrain_frames=640)
    cells = {cell.arm: cell.config for cell in mazes.make_cells(tmp_path)}
    assert list(cells) == list(arms.ARMS)
    learner = {arm: vars(config.learner) for arm, config in cells.items()}
    for arm, changed in arms.ARMS.items():
        differs = {
            name for name, x in learner[arm].items() if x != learner["aps"][name]
        }
        if "agent" in changed:
            weights = agents.AGENTS[changed["agent"]].options
            assert differs == {
                name for name, x in weights.items() if x != learner["aps"][name]
            }
        else:
            assert differs == changed.keys()
        assert cells[arm].pretrain.pretrain_frames == 640


def test_large_mazes_have_their_own_values(tmp_path):
    set_flags(mazes=["large"], maze_arms=["aps"], seeds=["3"])
    cells = mazes.make_cells(tmp_path)
    assert [cell.world for cell in cells] == list(maze.LARGE)
    assert {cell.config.learner.discount for cell in cells} == {0.99}
    assert cells[0].seeds == (0, 1, 2) and cells[0].folder == tmp_path / "snake" / "aps"


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"mazes": ["spirals"]}, "Unknown maze 'spirals'"),
        ({"maze_arms": ["apt"]}, "Unknown arm 'apt'"),
        ({"agent": "visr"}, "--agent"),
        ({"pretrain_epsilon": 0.5}, "--pretrain_epsilon"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, wrong, named):
    set_flags(seeds=["1"], **wrong)
    with pytest.raises(ValueError, match=named):
        mazes.make_cells(tmp_path)
