"""Tests of aps_jax.report.by_reward."""

import json

import numpy as np

from aps_jax.report import by_reward, tables


def write(folder, values):
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(values))


def write_rewards(root, game, seed, **zero_shot):
    """Results of one seed: random play returns 1, R^2 is a tenth of the seed."""
    rewards = [
        {
            "reward": name,
            "adapted": {
                "r_squared": seed / 10,
                "num_samples": 100,
                "num_nonzero": 10 * seed,
            },
            "zero_shot": {"return_mean": value},
            "random": {"return_mean": 1.0},
        }
        for name, value in zero_shot.items()
    ]
    folder = root / game / "aps" / f"seed_{seed}" / "rewards"
    write(folder, {"game": game, "agent": "aps", "rewards": rewards})


def test_rows_are_means_over_seeds(tmp_path):
    for seed, value in enumerate((2.0, 4.0, 9.0)):
        write_rewards(tmp_path, "Pong", seed, score=value, survival=1.0)
    write(tmp_path / "Pong/aps/seed_1/pretrained", {"return_mean": 7.0})
    write(tmp_path / "Pong/aps/seed_2/pretrained_survival", {"return_mean": 3.0})
    score, survival = by_reward.collect(tmp_path, num_resamples=5_000)
    assert (score.game, score.reward, score.num_seeds) == ("Pong", "score", 3)
    assert score.zero_shot.value == 5.0  # (2 + 4 + 9) / 3
    assert score.zero_shot.low == 2.0 and score.zero_shot.high == 9.0
    assert score.random == (1.0, 1.0, 1.0)
    # Fine-tuned on the reward itself, where it was: one seed has no interval.
    assert score.finetuned.value == 7.0 and np.isnan(score.finetuned.low)
    assert survival.finetuned.value == 3.0
    np.testing.assert_allclose(score.r_squared.value, 0.1)
    assert (score.num_samples, score.num_nonzero) == (100.0, 10.0)


def test_a_users_reward_has_a_folder_of_its_own():
    assert by_reward.folder_suffix("score") == ""
    assert by_reward.folder_suffix("my.module:left") == "_my.module_left"


def test_words(tmp_path):
    write_rewards(tmp_path, "Pong", 0, **{"my.module:left": 1234.5})
    write_rewards(tmp_path, "Freeway", 0, score=0.0)
    table = by_reward.table(by_reward.collect(tmp_path, num_resamples=10))
    assert table.rows == (
        ("Freeway", "aps", "score", "1", "1.0", "0.0", "-", "0.000", "100 (0)"),
        ("Pong", "aps", "left", "1", "1.0", "1,234.5", "-", "0.000", "100 (0)"),
    )
    assert len(table.columns) == len(table.rows[0])
    title, _, header, *_ = tables.table_lines(table, "## {}")
    assert title == f"## {table.title}"
    assert header.startswith("| game | agent | reward |")


def test_nothing_to_read_is_no_row(tmp_path):
    assert by_reward.collect(tmp_path) == []
