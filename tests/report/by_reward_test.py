"""Tests of aps_jax.report.by_reward."""

import json

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
            **({"random_tasks": {"return_mean": 0.5}} if game != "Freeway" else {}),
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
    # (2 + 4 + 9) / 3. Fine-tuned on the reward itself: one seed has no interval.
    skills = "0.5 [0.5, 0.5]"
    of_score = (skills, "1.0 [1.0, 1.0]", "5.0 [2.0, 9.0]", "7.0", "0.100", "100 (10)")
    of_survival = (
        skills,
        "1.0 [1.0, 1.0]",
        "1.0 [1.0, 1.0]",
        "3.0",
        "0.100",
        "100 (10)",
    )
    assert by_reward.table(tmp_path).rows == (
        ("Pong", "aps", "score", "3", *of_score),
        ("Pong", "aps", "survival", "3", *of_survival),
    )


def test_a_users_reward_has_a_folder_of_its_own():
    assert by_reward.folder_suffix("score") == ""
    assert by_reward.folder_suffix("my.module:left") == "_my.module_left"


def test_words(tmp_path):
    write_rewards(tmp_path, "Pong", 0, **{"my.module:left": 1234.5})
    write_rewards(tmp_path, "Freeway", 0, score=0.0)
    table = by_reward.table(tmp_path)
    assert table.rows == (
        ("Freeway", "aps", "score", "1", "-", "1.0", "0.0", "-", "0.000", "100 (0)"),
        ("Pong", "aps", "left", "1", "0.5", "1.0", "1,234.5", "-", "0.000", "100 (0)"),
    )
    assert len(table.columns) == len(table.rows[0])
    title, _, header, *_ = tables.table_lines(table, "## {}")
    assert title == f"## {table.title}"
    assert header.startswith("| game | agent | reward |")


def test_nothing_to_read_is_no_table(tmp_path):
    assert by_reward.table(tmp_path) is None
