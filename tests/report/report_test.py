"""Tests of a report: its numbers, tables, files and pictures, and the script."""

import json

import fake_runs
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import scripts
from absl import flags
from absl.testing import flagsaver

from aps_jax.report import aggregates, figures, finished_runs, report, tables
from aps_jax.scores import protocol, scores
from experiments import report as script

THREE_GAMES = {
    "pong": {"pretrained": (0.2, 0.4, 0.6), "scratch": (0.1, 0.2, 0.3)},
    "breakout": {"pretrained": (1.0, 1.5, 1.1), "scratch": (0.5, 0.7, 0.6)},
    "freeway": {"pretrained": (0.3, 0.3, 0.3), "scratch": (0.3, 0.5, 0.1)},
}


@pytest.fixture
def three_games(tmp_path):
    root = tmp_path / "runs"
    for game, arms in THREE_GAMES.items():
        fake_runs.write_arms(root, game, arms)
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report of the three games with all its files, for tests that only read it."""
    root = tmp_path_factory.mktemp("runs")
    for game, arms in THREE_GAMES.items():
        fake_runs.write_arms(root, game, arms)
    out = tmp_path_factory.mktemp("reports") / "new" / "out"
    return build(root, out=out), out


def build(*folders, **options):
    options = {"num_resamples": 300, **options}
    return report.report(folders, **options)


def row_of(built, game):
    return next(row for row in built.games if row.game == game)


def table_of(built, title):
    return next(t for t in tables.tables(built) if t.title.startswith(title))


def cells_of(table, first):
    (row,) = [row for row in table.rows if row[0] == first]
    return dict(zip(table.columns, row, strict=True))


# Numbers.


def test_cells_are_means_over_seeds_with_their_range(three_games):
    row = row_of(build(three_games), "pong")
    assert (row.random, row.human) == (-20.7, 14.6)
    cell = row.cells["aps"]
    # -20.7 + 35.3 * (0.2 + 0.4 + 0.6) / 3 = -6.58.
    assert cell.score.value == pytest.approx(-6.58)
    assert cell.normalized.value == pytest.approx(0.4)
    # All three of a resample are the least one with probability 1/27 > 2.5 %.
    assert cell.normalized.low == pytest.approx(0.2)
    assert cell.normalized.high == pytest.approx(0.6)
    assert cell.score.low == pytest.approx(-20.7 + 35.3 * 0.2)
    assert cell.num_seeds == 3
    assert row.published["APS"].score == 12.5


def test_aggregates_by_hand(three_games):
    built = build(three_games)
    summary = built.summaries["aps"]
    assert summary.num_games == 3
    # Means of the games: 0.4, 1.2 and 0.3.
    assert summary.mean.value == pytest.approx(1.9 / 3)
    assert summary.median.value == pytest.approx(0.4)
    # Of nine sorted runs, 0.2 and 0.3 below, 1.1 and 1.5 above are dropped.
    assert summary.interquartile_mean.value == pytest.approx(
        (0.3 + 0.3 + 0.4 + 0.6 + 1.0) / 5
    )
    assert summary.optimality_gap.value == pytest.approx((0.6 + 0.0 + 0.7) / 3)
    assert summary.superhuman_count.value == 1
    assert summary.mean.low < summary.mean.value < summary.mean.high
    assert built.summaries["aps scratch"].mean.value == pytest.approx(1.1 / 3)


def test_pretrained_is_compared_with_scratch(three_games):
    built = build(three_games)
    (comparison,) = built.comparisons
    assert (comparison.label, comparison.baseline) == ("aps", "aps scratch")
    assert comparison.num_games == 3
    # Pong: of nine pairs, 0.2 wins once and ties once, 0.4 and 0.6 win all: 7.5.
    # Breakout: 9. Freeway: each 0.3 ties once, wins once, loses once: 4.5.
    assert comparison.probability.value == pytest.approx((7.5 + 9.0 + 4.5) / 27)
    assert comparison.mean_gain.value == pytest.approx(0.8 / 3)
    gains = {gain.game: gain for gain in comparison.games}
    assert gains["pong"].gain.value == pytest.approx(35.3 * 0.2)
    assert gains["pong"].gain.low > 0.0
    assert gains["freeway"].gain.value == pytest.approx(0.0)
    assert gains["freeway"].gain.low < 0.0 < gains["freeway"].gain.high
    assert gains["breakout"].probability == pytest.approx((1.0, 1.0, 1.0))
    ours, theirs = built.summaries["aps"], built.summaries["aps scratch"]
    assert comparison.interquartile_mean_gain.value == pytest.approx(
        ours.interquartile_mean.value - theirs.interquartile_mean.value
    )


def test_published_systems_are_computed_on_the_games_of_the_runs(three_games):
    built = build(three_games)
    normalized = {
        game: scores.human_normalized_score(
            game, scores.published_scores()["APS"][game].score
        )
        for game in THREE_GAMES
    }
    summary = built.published["APS"]
    assert summary.num_games == 3
    assert summary.mean.value == pytest.approx(np.mean(list(normalized.values())))
    assert np.isnan(summary.mean.low)
    everywhere = build().published["APS"]
    assert (everywhere.num_games, everywhere.superhuman_count.value) == (26, 7)


def test_a_single_seed_has_no_interval(tmp_path):
    fake_runs.write_arms(tmp_path, "pong", {"pretrained": [0.5]}, spread=4.0)
    built = build(tmp_path)
    cell = row_of(built, "pong").cells["aps"]
    # Four games at -7.05, 0.95 and twice -3.05.
    assert cell.score.value == pytest.approx(-3.05) and np.isnan(cell.score.low)
    assert np.isnan(built.summaries["aps"].mean.low)
    assert any("single seeds" in notice for notice in built.notices)
    assert cells_of(table_of(built, "Scores"), "Pong")["aps"] == "-3.1"


def test_mixed_protocols_are_kept_apart_and_said(tmp_path):
    sticky = {**fake_runs.PROTOCOL, "sticky": 0.25}
    for seed in range(2):
        fake_runs.write(tmp_path / f"a{seed}", fake_runs.result([1.0] * 4, seed=seed))
        fake_runs.write(
            tmp_path / f"b{seed}",
            fake_runs.result([9.0] * 4, seed=seed, protocol=sticky),
        )
    built = build(tmp_path)
    cells = row_of(built, "pong").cells
    assert set(cells) == {"aps (sticky=0.0)", "aps (sticky=0.25)"}
    assert cells["aps (sticky=0.25)"].score.value == 9.0
    (notice,) = [n for n in built.notices if n.startswith("Mixed protocols")]
    assert "sticky is 0.0 in aps (sticky=0.0); 0.25 in aps (sticky=0.25)" in notice
    # Pretrained methods are compared with each other under one protocol only.
    assert built.comparisons == ()
    notes = table_of(built, "Scores").notes
    assert any("sticky actions 0.25" in note for note in notes)
    assert any("no sticky actions" in note for note in notes)


def test_a_preset_names_all_its_options_at_once(tmp_path):
    for preset, batch in (("cpu", 32), ("gpu", 1024)):
        for seed in range(2):
            fake_runs.write(
                tmp_path / preset / str(seed),
                fake_runs.result(preset=preset, seed=seed),
                options={"batch_size": batch, "td_form": "split"},
            )
    built = build(tmp_path)
    assert [m.label for m in built.methods] == [
        "aps (preset=cpu)",
        "aps (preset=gpu)",
    ]
    told = [notice for notice in built.notices if notice.startswith("Mixed")]
    assert len(told) == 1 and "preset is cpu in" in told[0]


def test_an_ablation_is_named_by_its_option_and_compared(tmp_path):
    for form, score in (("split", 5.0), ("vector", 3.0)):
        for seed in range(2):
            fake_runs.write(
                tmp_path / form / str(seed),
                fake_runs.result([score, score], seed=seed),
                options={"td_form": form, "batch_size": 32},
            )
    built = build(tmp_path)
    (comparison,) = built.comparisons
    assert comparison.label == "aps (td_form=split)"
    assert comparison.baseline == "aps (td_form=vector)"
    assert comparison.mean_gain.value == pytest.approx(2.0 / 35.3)


def test_scratch_of_another_budget_is_no_baseline(tmp_path):
    fake_runs.write(tmp_path / "a", fake_runs.result())
    fake_runs.write(tmp_path / "b", fake_runs.result(init=None, finetune_agent_steps=5))
    assert build(tmp_path).comparisons == ()


def write_agents(root, **options):
    """Writes two seeds of each agent, whose own option has the given value."""
    for agent, value in options.items():
        for seed in range(2):
            fake_runs.write(
                root / agent / str(seed),
                fake_runs.result(agent=agent, seed=seed),
                options={"skill_weight": value, "batch_size": 32},
            )


def test_agents_are_ordered_and_compared(tmp_path):
    write_agents(tmp_path, visr=1.0, entropy=0.0, aps=1.0)
    built = build(tmp_path)
    assert [method.label for method in built.methods] == ["aps", "entropy", "visr"]
    assert [(c.label, c.baseline) for c in built.comparisons] == [
        ("aps", "entropy"),
        ("aps", "visr"),
        ("entropy", "visr"),
    ]
    assert not any(notice.startswith("Mixed") for notice in built.notices)
    assert "Did pretraining help?" not in [
        table.title for table in tables.tables(built)
    ]


def test_budgets_in_which_agents_differ_are_mixed_settings(tmp_path):
    fake_runs.write(tmp_path / "a", fake_runs.result(agent="aps"))
    fake_runs.write(tmp_path / "b", fake_runs.result(agent="visr", pretrain_frames=5))
    built = build(tmp_path)
    assert [method.label for method in built.methods] == ["aps", "visr"]
    (notice,) = [n for n in built.notices if n.startswith("Mixed settings")]
    assert "pretrain_frames is 400000 in aps; 5 in visr" in notice


def test_any_agent_is_reported_by_its_own_name(tmp_path):
    fake_runs.write_arms(tmp_path, "pong", {"scratch": [0.2, 0.4]}, agent="ddqn")
    built = build(tmp_path)
    assert list(built.summaries) == ["ddqn scratch"]
    assert cells_of(table_of(built, "Methods"), "ddqn scratch")["seeds"] == "2"


# Protocols under which the game is another one.
OTHER_GAMES = [
    {"max_frames": 400},
    {"sticky": 0.25},
    {"fire_reset": True},
    {"noop_max": 1},
]


@pytest.mark.parametrize("change", OTHER_GAMES)
def test_scores_of_another_game_are_neither_normalised_nor_aggregated(tmp_path, change):
    for seed in range(2):
        for arm, init in (("pretrained", "p"), ("scratch", None)):
            values = fake_runs.result(
                [3.0 + seed] * 4,
                seed=seed,
                init=init,
                protocol={**fake_runs.PROTOCOL, **change},
            )
            metrics = "agent_steps,episode_return\n4000,3\n8000,4\n"
            fake_runs.write(tmp_path / f"{arm}{seed}", values, metrics=metrics)
    built = build(tmp_path, out=tmp_path / "out")
    (row,) = built.games
    assert {cell.score.value for cell in row.cells.values()} == {3.5}
    assert {cell.normalized for cell in row.cells.values()} == {None}
    assert built.summaries == built.published == {}
    # What pretraining gained is still known, in points of that game.
    (comparison,) = built.comparisons
    assert comparison.games[0].gain.value == 0.0
    assert comparison.num_games == 0
    assert comparison[3:6] == (None, None, None)
    table = table_of(built, "Scores")
    assert cells_of(table, "Pong")["aps %"] == "-"
    assert table.columns[3:] == ("aps", "aps %", "aps scratch", "aps scratch %")
    titles = [table.title for table in tables.tables(built)]
    assert not any(title.startswith("Human-normalised") for title in titles)
    assert any("no human-normalised score" in notice for notice in built.notices)
    drawn = [path.name for path in (tmp_path / "out").glob("*.png")]
    assert drawn == ["learning_curves.png"]
    levels = [line.get_ydata()[0] for line in _curves_of(built).lines]
    assert -20.7 not in levels and 14.6 not in levels


def _curves_of(built):
    (axes,) = figures.draw_learning_curves(built).axes
    return axes


def test_only_comparable_methods_are_aggregated(tmp_path):
    cut = {**fake_runs.PROTOCOL, "max_frames": 400}
    for seed in range(2):
        fake_runs.write(tmp_path / f"a{seed}", fake_runs.result(seed=seed))
        values = fake_runs.result(seed=seed, protocol=cut)
        fake_runs.write(tmp_path / f"b{seed}", values)
    built = build(tmp_path)
    assert list(built.summaries) == ["aps (max_frames=108000)"]
    cells = cells_of(table_of(built, "Scores"), "Pong")
    assert cells["aps (max_frames=400) %"] == "-"
    assert cells["aps (max_frames=108000) %"] == "67.1"  # (3 + 20.7) / 35.3
    assert cells["APS"] == "12.5"


def test_a_protocol_with_an_entry_more_is_another_protocol(tmp_path):
    fire = {**fake_runs.PROTOCOL, "fire_reset": True}
    fake_runs.write(tmp_path / "a", fake_runs.result(agent="aps"))
    fake_runs.write(tmp_path / "b", fake_runs.result(agent="visr", protocol=fire))
    assert build(tmp_path).comparisons == ()


def test_unequal_games_and_seeds_are_said(tmp_path):
    fake_runs.write_arms(
        tmp_path, "pong", {"pretrained": [0.5] * 3, "scratch": [0.1] * 2}
    )
    fake_runs.write_arms(tmp_path, "freeway", {"pretrained": [0.7] * 2})
    built = build(tmp_path)
    told = "\n".join(built.notices)
    assert "Methods played different games, 2 (aps), 1 (aps scratch)" in told
    assert "aps: 2 to 3 seeds per game; the IQM pools runs" in told
    (comparison,) = built.comparisons
    assert [gain.game for gain in comparison.games] == ["pong"]
    assert cells_of(table_of(built, "Scores"), "Freeway")["aps scratch"] == ""


def test_a_game_without_a_table_has_points_but_no_aggregate(tmp_path):
    fake_runs.write(tmp_path / "a", fake_runs.result(game="Tetris"))
    fake_runs.write(tmp_path / "b", fake_runs.result(game="Tetris", init=None))
    built = build(tmp_path, out=tmp_path / "out")
    row = row_of(built, "Tetris")
    assert row.random is None and row.cells["aps"].normalized is None
    assert row.cells["aps"].score.value == 3.0
    assert built.summaries == {} and built.published == {}
    (comparison,) = built.comparisons
    assert comparison.probability is None and comparison.num_games == 0
    assert comparison.games[0].gain.value == 0.0
    assert any("no random and human scores for Tetris" in n for n in built.notices)
    fake_runs.write(tmp_path / "c", fake_runs.result())
    table = table_of(build(tmp_path), "Scores")
    assert cells_of(table, "Tetris")["APS"] == ""
    assert cells_of(table, "Tetris")["aps %"] == "-"
    assert cells_of(table, "Pong")["APS"] == "12.5"


def test_what_is_not_standard_is_said(three_games):
    told = "\n".join(build(three_games).notices)
    assert "Mixed" not in told
    assert "aps, aps scratch: not the standard protocol: episodes 4" in told
    assert "aps, aps scratch: with 3 seeds, 95 % intervals are too narrow" in told


def test_the_standard_protocol_with_many_seeds_says_nothing(tmp_path):
    for seed in range(5):
        fake_runs.write(
            tmp_path / str(seed), fake_runs.result([1.0] * 100, game="Alien", seed=seed)
        )
    assert build(tmp_path).notices == ()


# Words and files.


def test_published_report_marks_what_cannot_be_right():
    built = build()
    table = table_of(built, "Scores")
    (note,) = table.notes
    assert note.startswith("? Printed so")
    assert cells_of(table, "Pong")["VISR"] == "-26.2?"
    assert cells_of(table, "Freeway")["VISR"] == "-12.1?"
    assert cells_of(table, "Assault")["VISR"] == "12,091?"
    assert cells_of(table, "Alien")["VISR"] == "364.4"
    assert cells_of(table_of(built, "Human-normalised"), "VISR?")["mean"] == "145.0"
    suspects = [notice for notice in built.notices if "suspect" in notice]
    assert [notice.split(":")[0] for notice in suspects] == [
        *("VISR, Assault", "VISR, Freeway", "VISR, Pong")
    ]
    assert len(built.games) == 26 and built.methods == ()


def test_words_of_a_game(three_games):
    table = table_of(build(three_games, systems=["APS"]), "Scores")
    assert len(table.notes) == 2  # No question mark to explain.
    cells = cells_of(table, "Pong")
    assert cells["random"] == "-20.7" and cells["human"] == "14.6"
    assert cells["aps"] == "-6.6 [-13.6, 0.5]"
    assert cells["aps %"] == "40.0"
    assert cells["APS"] == "12.5"


def test_words_of_aggregates_and_comparisons(three_games):
    built = build(three_games)
    cells = cells_of(table_of(built, "Human-normalised"), "aps")
    assert cells["games"] == "3"
    assert cells["mean"].startswith("63.3 [")
    assert cells["at or above human"].startswith("1 [")
    cells = cells_of(table_of(built, "Comparisons"), "aps over aps scratch")
    assert cells["P(improvement)"].startswith("0.78 [")
    assert cells["gain in mean"].startswith("+26.7 [")
    gains = {row[0]: row[2] for row in table_of(built, "Did pretraining").rows}
    assert gains["Pong"].startswith("+7.1 [")
    cells = cells_of(table_of(built, "Methods"), "aps scratch")
    assert cells["pretraining (frames)"] == "-"
    assert cells["fine-tuning (agent steps)"] == "12,000"
    assert cells["seeds"] == "3"


def test_the_protocol_stands_under_every_table_of_scores(three_games):
    built = build(three_games)
    wanted = f"Evaluation: {protocol.text(fake_runs.PROTOCOL)}."
    for title in ("Methods", "Scores", "Human-normalised"):
        assert wanted in table_of(built, title).notes


def test_files_are_written_and_agree(drawn):
    built, out = drawn
    assert sorted(path.name for path in out.iterdir()) == [
        "aggregates.png",
        "learning_curves.png",
        "report.json",
        "report.md",
    ]
    content = json.loads((out / "report.json").read_text())
    assert content["kind"] == tables.KIND and content["schema"] == 1
    assert content["summaries"]["aps"]["mean"]["value"] == pytest.approx(1.9 / 3)
    assert content["published"]["APS"]["mean"]["low"] is None
    (method, _) = content["methods"]
    assert method["runs"]["pong"][1]["seed"] == 1
    assert method["runs"]["pong"][1]["returns"] == pytest.approx([-6.58] * 4)

    text = (out / "report.md").read_text()
    for table in tables.tables(built):
        assert f"## {table.title}" in text
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in text
    for notice in built.notices:
        assert f"- {notice}" in text
    assert "![learning curves](learning_curves.png)" in text


def test_markdown_escapes_what_would_break_a_table(tmp_path):
    fake_runs.write(tmp_path, fake_runs.result(agent="a|b"))
    assert "| a\\|b | cpu |" in tables.to_markdown(build(tmp_path))


def test_the_same_runs_give_the_same_files(drawn, three_games, tmp_path):
    first, second = (build(three_games, out=tmp_path / name) for name in ("a", "b"))
    assert first.summaries == second.summaries
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in drawn[1].iterdir())
    for name in names:
        a, b = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert a == b


def test_an_earlier_report_is_replaced_and_nothing_else(
    three_games, tmp_path, monkeypatch
):
    monkeypatch.setattr(figures, "draw_all", lambda *_: [])
    out = tmp_path / "out"
    build(out=out)
    assert sorted(path.name for path in out.iterdir()) == [
        "report.json",
        "report.md",
    ]
    build(three_games, out=out)
    assert "aps scratch" in (out / "report.md").read_text()

    mine = tmp_path / "mine"
    mine.mkdir()
    for content in (None, "{", "[]", '{"kind": "else"}'):
        (mine / "report.md").write_text("my notes")
        if content is not None:
            (mine / "report.json").write_text(content)
        with pytest.raises(ValueError, match="not from this program"):
            build(three_games, out=mine)
        assert (mine / "report.md").read_text() == "my notes"
    with pytest.raises(ValueError, match="is not a folder"):
        build(three_games, out=mine / "report.md")


def test_nothing_is_written_where_nothing_can_be_reported(tmp_path):
    with pytest.raises(ValueError, match="No such folder"):
        build(tmp_path / "nowhere", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_systems_are_chosen_by_name():
    assert aggregates.named_systems(["APS", "BBF", "APS"]) == ("APS", "BBF")
    assert len(aggregates.named_systems(["all"])) == 23
    with pytest.raises(ValueError, match="No published system 'Nobody'; .*SimPLe"):
        aggregates.named_systems(["Nobody"])
    assert list(build(systems=["BBF"]).published) == ["BBF"]


def test_printed_columns_are_as_wide_as_their_cells(capsys):
    table = tables.Table("T", ("a", "long"), (("abc", "1"), ("d", "23456")), ("n",))
    tables.show_tables([table], ["said"])
    assert capsys.readouterr().out.splitlines() == [
        *("", "T", ""),
        "a     long",
        "---  -----",
        "abc      1",
        "d    23456",
        *("", "n", "Note: said"),
    ]


# Pictures.


def test_pictures_show_something(drawn):
    paths = list(drawn[1].glob("*.png"))
    assert len(paths) == 2
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.05


def test_bars_are_as_long_as_the_aggregates(three_games):
    built = build(three_games)
    figure = figures.draw_aggregates(built)
    axes = figure.axes[0]
    widths = [patch.get_width() for patch in axes.patches]
    summaries = [*built.summaries.values(), *built.published.values()]
    np.testing.assert_allclose(
        widths, [100.0 * float(summary.mean.value) for summary in summaries]
    )
    (intervals,) = axes.collections
    shown = [ends for ends in intervals.get_segments() if ends.size]
    assert len(shown) == len(built.summaries)
    low, high = built.summaries["aps"].mean[1:]
    np.testing.assert_allclose(shown[0][:, 0], [100 * low, 100 * high])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:2] == ["aps", "aps scratch"] and "VISR?" in labels


def test_a_method_has_one_colour_in_every_picture(tmp_path):
    # The first method has no aggregate, as its game has no random and human scores.
    fake_runs.write(tmp_path / "t", fake_runs.result(game="Tetris"))
    fake_runs.write_arms(tmp_path, "pong", {"scratch": [0.2, 0.4]})
    built = build(tmp_path)
    bar = figures.draw_aggregates(built).axes[0].patches[0]
    figure = figures.draw_learning_curves(built)
    curve = figure.axes[0].lines[0]
    assert curve.get_label() == "aps scratch"
    expected = figures._COLORS[1]
    assert curve.get_color() == expected
    assert matplotlib.colors.same_color(bar.get_facecolor(), expected)


def test_learning_curves_have_a_panel_per_game(three_games):
    figure = figures.draw_learning_curves(build(three_games))
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["Breakout", "Freeway", "Pong"]
    pong = shown[2]
    (line,) = [line for line in pong.lines if line.get_label() == "aps"]
    np.testing.assert_array_equal(line.get_xdata(), [4000, 8000, 12000])
    # The mean over seeds is -6.58 at the end, one point less at the first step.
    np.testing.assert_allclose(line.get_ydata(), [-7.58, -7.08, -6.58])
    assert len(pong.collections) == 4  # A band and bars of evaluations per arm.


def test_human_level_is_drawn_only_where_curves_stay_readable(tmp_path):
    fake_runs.write_arms(tmp_path, "pong", {"pretrained": [0.5]})
    fake_runs.write_arms(tmp_path, "seaquest", {"pretrained": [0.01]})
    pong, seaquest = figures.draw_learning_curves(build(tmp_path)).axes
    levels = [line.get_ydata()[0] for line in pong.lines]
    assert -20.7 in levels and 14.6 in levels
    levels = [line.get_ydata()[0] for line in seaquest.lines]
    assert 68.4 in levels and 42054.7 not in levels


def test_no_learning_curves_without_metrics(tmp_path):
    fake_runs.write(tmp_path, fake_runs.result())
    assert figures.draw_learning_curves(build(tmp_path)) is None
    names = [path.name for path in figures.draw_all(build(tmp_path), tmp_path)]
    assert "learning_curves.png" not in names


def test_curves_are_averaged_where_all_of_them_are_known():
    first = finished_runs.Curve(np.array([0.0, 10.0]), np.array([0.0, 10.0]))
    second = finished_runs.Curve(np.array([5.0, 20.0]), np.array([1.0, 4.0]))
    x, estimate = figures.average([first, second])
    np.testing.assert_array_equal(x, [5.0, 10.0])
    np.testing.assert_allclose(estimate.value, [(5 + 1) / 2, (10 + 2) / 2])
    np.testing.assert_allclose(estimate.low, [1.0, 2.0])
    np.testing.assert_allclose(estimate.high, [5.0, 10.0])
    x, estimate = figures.average([first])
    np.testing.assert_array_equal(x, [0.0, 10.0])
    assert np.isnan(estimate.low).all()


def test_curves_without_a_common_step_are_not_drawn():
    first = finished_runs.Curve(np.array([0.0, 1.0]), np.array([3.0, 5.0]))
    second = finished_runs.Curve(np.array([2.0, 4.0]), np.array([1.0, 9.0]))
    x, estimate = figures.average([first, second])
    assert x.size == estimate.value.size == estimate.low.size == 0


def test_long_curves_are_thinned():
    steps = np.arange(1000.0)
    x, estimate = figures.average([finished_runs.Curve(steps, 2.0 * steps)] * 2)
    assert x.size == 200 and (x[0], x[-1]) == (0.0, 999.0)
    np.testing.assert_allclose(estimate.value, 2.0 * x)


# The script.


def run_script(*arguments, **values):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**values):
        script.main(["report", *map(str, arguments)])


def test_script_reports_runs(three_games, tmp_path, capsys):
    run_script(three_games, out=str(tmp_path / "out"))
    shown = capsys.readouterr().out
    assert "Human-normalised score, percent" in shown
    assert "aps over aps scratch" in shown
    assert f"Written to {tmp_path / 'out'}" in shown
    assert (tmp_path / "out" / "report.md").exists()
    assert (tmp_path / "out" / "aggregates.png").exists()


def test_script_reports_published_systems_without_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_script(out="", published=True, systems=["all"])
    shown = capsys.readouterr().out
    assert "Human-normalised score, percent" in shown and "BBF" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, values, message",
    [
        ([], {}, "Give folders of runs, or --published, and not both."),
        (["runs"], {"published": True}, "and not both."),
        (["nowhere"], {}, "No such folder: nowhere."),
        ([], {"published": True, "systems": ["X"]}, "No published system 'X'"),
        (["."], {}, "No finished run with a score in ."),
        ([], {"published": True, "out": "file"}, "file is not a folder."),
        ([], {"published": True, "out": "file/x"}, "file"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    tmp_path, capsys, monkeypatch, arguments, values, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        run_script(*arguments, **values)
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert message in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_bad_input_in_a_real_process():
    done = scripts.run_script("report", "nowhere", "--out=", timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: No such folder: nowhere.\n"
