"""Tests of aps_jax.report.published: which runs count, and what lies inside."""

import fake_runs
import pytest

from aps_jax.report import finished_runs, published, report, tables
from aps_jax.scores import scores


def write(root, agent, game, means, **changes):
    """Writes a run of 100,000 agent steps of reward alone for each mean."""
    for seed, mean in enumerate(means):
        values = {"finetune_agent_steps": 100_000, "init": None, **changes}
        returns = [mean - 1.0, mean + 1.0] * 50
        fake_runs.write(
            root / game / agent / str(seed),
            fake_runs.result(returns, agent=agent, game=game, seed=seed, **values),
        )


def rows_of(root):
    built = report.report([root], num_resamples=10)
    return built, published.rows(built.methods)


def test_ranges_known_by_hand(tmp_path):
    # 9154.36 +- 1.96 * 4722 / sqrt(3) = 9154.36 +- 5343.47.
    write(tmp_path, "curl", "CrazyClimber", [3_000.0, 4_000.0, 4_500.0])
    # 2.55 +- 1.96 * 1.3 / sqrt(2) = 2.55 +- 1.80.
    write(tmp_path, "curl", "Breakout", [1.0, 1.0])
    write(tmp_path, "curl", "Assault", [500.0])  # No deviation is published.
    write(tmp_path, "der", "CrazyClimber", [15_000.0, 16_000.0])
    built, rows = rows_of(tmp_path)
    assert [tuple(row.values()) for row in rows] == [
        ("curl scratch", "Assault", "1", "500.0", *assault()),
        (
            *("curl scratch", "Breakout", "2", "1.0", "2.5"),
            *("CURL_rliable100_final", "0.7 to 4.4", "inside"),
        ),
        (
            *("curl scratch", "CrazyClimber", "3", "3,833.3", "9,154.4"),
            *("CURL_rliable100_final", "3,810.9 to 14,497.8", "inside"),
        ),
        (
            *("der scratch", "CrazyClimber", "2", "15,500.0", "16,185.3"),
            *("DER", "-", "-"),
        ),
    ]
    (shown,) = [t for t in tables.tables(built) if t.title == published.TITLE]
    assert shown.rows == tuple(tuple(row.values()) for row in rows)
    assert published.NOTE in tables.to_markdown(built)


def assault():
    cell = scores.published_scores()["CURL_rliable100_final"]["assault"]
    return f"{cell.score:,.1f}", "CURL_rliable100_final", "-", "-"


@pytest.mark.parametrize(
    "mean, verdict",
    [(0.0, "outside"), (0.76, "inside"), (4.34, "inside"), (4.36, "outside")],
)
def test_what_lies_beyond_either_end_is_outside(tmp_path, mean, verdict):
    write(tmp_path, "curl", "Breakout", [mean, mean])
    _, (row,) = rows_of(tmp_path)
    assert row[""] == verdict


@pytest.mark.parametrize(
    "changes",
    [
        {"agent": "dqn"},
        {"finetune_agent_steps": 12_000},
        {"init": "runs/p"},
        {"protocol": {**fake_runs.PROTOCOL, "episodes": 10}},
        {"game": "Venture"},  # Not of the 26.
    ],
    ids=str,
)
def test_what_was_not_run_as_published_is_left_out(tmp_path, changes):
    agent = changes.pop("agent", "curl")
    game = changes.pop("game", "Breakout")
    write(tmp_path, agent, game, [2.0], **changes)
    built, rows = rows_of(tmp_path)
    assert rows == []
    assert published.TITLE not in [table.title for table in tables.tables(built)]
    assert finished_runs.collect([tmp_path]).runs


def test_four_systems_have_deviations_in_ten_games():
    known = [
        (system, game)
        for system, cells in scores.published_scores().items()
        for game, cell in cells.items()
        if cell.deviation > 0.0
    ]
    assert len(known) == 40
    assert len(dict(known)) == 4 and len({game for _, game in known}) == 10
