"""Tests of experiments.minatar: what its arms are, what it writes, how it goes on."""

import json
import math

import numpy as np
import pytest
from scripts import set_flags

from aps_jax.train import stages
from experiments import minatar

pytestmark = pytest.mark.usefixtures("parsed_flags")


def test_it_writes_scores_and_tables_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(minatar, "_POINTS", (160, 240))
    monkeypatch.setattr(minatar, "_OPTIONS", {"eval_agent_steps": "160,240"})
    monkeypatch.setattr(
        minatar, "_RETURNS", {"after_160": "160 steps", "after_all": "all steps"}
    )
    columns = {"mean": "skill following", "zero_shot": "zero-shot", **minatar._RETURNS}
    monkeypatch.setattr(minatar, "_COLUMNS", columns)
    set_flags(
        workdir=str(tmp_path),
        minatar_games=["Breakout"],
        minatar_arms=["aps", "scratch"],
        seeds=["0", "1"],
        encoder="mlp",
        hidden_units=16,
        num_envs=8,
        batch_size=16,
        replay_size=640,
        report_agent_steps=160,
        warmup_agent_steps=160,
        pretrain_frames=320,
        skill_steps=8,
        finetune_num_envs=8,
        infer_agent_steps=80,
        finetune_agent_steps=320,
        finetune_samples_per_step=1.0,
        eval_episodes=1,
    )
    minatar.main(["minatar"])
    written = json.loads((tmp_path / "report" / "scores.json").read_text())
    pretrained, scratch = written["Breakout"]["aps"], written["Breakout"]["scratch"]
    assert len(pretrained) == len(scratch) == 2 and pretrained[0] != pretrained[1]
    returns = {"after_160", "after_240", "after_all"}
    assert set(scratch[0]) == returns
    own = {"mean", "predicted", "met", "visited", "zero_shot"}
    assert set(pretrained[0]) == returns | own
    assert all(math.isfinite(x) for row in pretrained for x in row.values())
    # Its own evaluations: the first from each point on, and the last.
    results = [
        json.loads(
            (tmp_path / f"Breakout/aps/finetune/seed_{s}/result.json").read_text()
        )
        for s in (0, 1)
    ]
    for row, result in zip(pretrained, results, strict=True):
        played = {
            e["agent_steps"]: e["eval_return_mean"] for e in result["evaluations"]
        }
        assert list(played) == [80, 160, 240, 320]
        assert list(played.values()) == [
            row["zero_shot"],
            row["after_160"],
            row["after_240"],
            row["after_all"],
        ]
    shown = capsys.readouterr().out
    mean = np.mean([row["mean"] for row in pretrained])
    assert "Breakout" in shown and f"{mean:.2f} [" in shown
    assert "P(improvement over scratch)" in (tmp_path / "report/report.md").read_text()

    # What is finished is read, not run.
    monkeypatch.setattr(stages, "_explore", None)
    monkeypatch.setattr(stages, "_learn", None)
    minatar.main(["minatar"])
    assert json.loads((tmp_path / "report" / "scores.json").read_text()) == written


def test_scratch_is_beaten_as_often_as_pairs_of_runs_say():
    def rows(*returns):
        return [{"after_10000": x, "after_30000": x, "after_all": 0.0} for x in returns]

    found = {
        ("Breakout", "aps"): rows(1.0, 3.0),
        ("Breakout", "scratch"): rows(2.0, 2.0),
        ("Asterix", "aps"): rows(5.0, 5.0),
        ("Asterix", "scratch"): rows(0.0, 0.0),
    }
    *of_games, beaten = minatar.make_tables(found)
    assert [table.title for table in of_games] == ["Breakout", "Asterix"]
    (row,) = (dict(zip(beaten.columns, row, strict=True)) for row in beaten.rows)
    # Half of the pairs in the one game, all in the other; ties are half.
    assert row["arm"] == "aps" and row["10,000 steps"].startswith("0.75 [")
    assert row["all steps"].startswith("0.50 [")
    assert of_games[0].rows[0][of_games[0].columns.index("skill following")] == "-"


def test_pretrained_arms_have_one_budget_and_scratch_its_own_agent(tmp_path):
    set_flags(minatar_games=["Asterix"], seeds=["3"])
    cells = {cell.arm: cell for cell in minatar.make_cells(tmp_path)}
    assert list(cells) == list(minatar.ARMS)
    assert {cell.config.finetune.finetune_agent_steps for cell in cells.values()} == {
        100_000
    }
    assert cells["scratch"].config.agent == "dqn"
    assert cells["aps"].config.pretrain.pretrain_frames == 2_000_000
    assert cells["aps"].config.game == "minatar/Asterix"
    assert cells["aps"].seeds == (0, 1, 2)


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"minatar_games": ["Pong"]}, "Unknown game 'Pong'"),
        ({"minatar_arms": ["apt"]}, "Unknown arm 'apt'"),
        ({"agent": "visr"}, "--agent"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, wrong, named):
    set_flags(seeds=["1"], **wrong)
    with pytest.raises(ValueError, match=named):
        minatar.make_cells(tmp_path)
