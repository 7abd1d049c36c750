"""Tests of a run's pictures: grids, videos, curves, the sphere in a plane."""

import functools

import fakes
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aps_jax import config as config_lib
from aps_jax.replay import buffer
from aps_jax.report import run_pictures
from aps_jax.runs import snapshots
from aps_jax.scores import scores
from aps_jax.train import stages


def video(color, length, height=20, width=30):
    return [np.full((height, width, 3), color, np.uint8) for _ in range(length)]


def test_videos_lie_in_a_grid_under_their_labels():
    sheets = run_pictures.tile(
        [video(40, 2), video(80, 1), video(120, 2)], ["a", "b", ""]
    )
    assert len(sheets) == 2
    rows = 2 * (20 + 14)
    assert sheets[0].shape == sheets[1].shape == (rows, 2 * 30, 3)
    for sheet, second in zip(sheets, (80, 40), strict=True):
        assert (sheet[14:34, :30] == 40).all()
        # The second game has ended after its first picture: it stays, darkened.
        assert (sheet[14:34, 30:] == second).all()
        assert (sheet[48:, :30] == 120).all()
        assert (sheet[48:, 30:] == 0).all()
        assert sheet[:14, :30].max() > 200 and sheet[34:48, :30].max() == 0


def test_a_long_label_stays_in_its_column():
    (sheet,) = run_pictures.tile([video(0, 1), video(0, 1)], ["m" * 50, ""])
    assert sheet[:14, :30].any() and not sheet[:14, 30:].any()


def test_a_gif_holds_every_picture(tmp_path):
    # A bright bar that moves: one palette serves all three.
    shown_pictures = np.zeros((3, 20, 30, 3), np.uint8)
    for index, picture in enumerate(shown_pictures):
        picture[:, 10 * index : 10 * index + 5] = (200, 100, 0)
    run_pictures.save_gif(tmp_path / "a.gif", list(shown_pictures))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
        image.seek(2)
        shown = np.array(image.convert("RGB"))
    np.testing.assert_allclose(shown, shown_pictures[2], atol=8)


# The feature sphere.


def test_the_plane_is_that_of_largest_variation():
    # Points vary by 3 along the third axis, by 2 along the first, else not at all.
    phi = np.array([[2, 5, 3], [2, 5, -3], [-2, 5, 3], [-2, 5, -3]], np.float32)
    np.testing.assert_allclose(
        run_pictures.plane_of(phi), [[0, 1], [0, 0], [1, 0]], atol=1e-12
    )


def test_points_of_the_sphere_lie_in_the_disc():
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(50, 5))
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    plane = run_pictures.plane_of(phi)
    np.testing.assert_allclose(plane.T @ plane, np.eye(2), atol=1e-12)
    assert np.linalg.norm(phi @ plane, axis=1).max() <= 1
    # Every other plane holds less of their variation.
    other, _ = np.linalg.qr(rng.normal(size=(5, 2)))
    centred = phi - phi.mean(axis=0)
    assert np.square(centred @ plane).sum() >= np.square(centred @ other).sum()


@pytest.mark.parametrize("phi", [np.ones((4, 3)), np.ones((1, 3)), np.ones((5, 1))])
def test_features_that_are_all_the_same_have_a_plane_too(phi):
    plane = run_pictures.plane_of(phi)
    assert plane.shape == (phi.shape[1], 2) and np.isfinite(plane).all()


def test_a_pretraining_leaves_snapshots_of_its_features(tmp_path):
    """Each row has one; they are unit vectors, the last of them the final agent's."""
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"),
        game=fakes.PLANES,
        encoder="mlp",
        pretrain_frames=4 * 160,
        replay_size=240,
        warmup_agent_steps=60,
        report_agent_steps=40,
        pretrain_epsilon=0.5,  # Else the first row may have met a single state.
    )
    pretrain = functools.partial(stages.pretrain, constructor=fakes.PlanesPool)
    pretrain(config, tmp_path / "p")
    found = snapshots.read_snapshots(tmp_path / "p")
    assert [one.agent_steps for one in found] == [80, 120, 160]
    for one in found:
        for vectors in (one.arrays["phi"], one.arrays["task"]):
            assert vectors.shape == (256, 5)
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    # The chain has five states, so that there are few distinct features.
    trained = stages.load_pretrained(tmp_path / "p")
    start = fakes.PlanesPool(fakes.PLANES, 1, seeds=[0]).reset().frame
    window = buffer.Window(*[None] * len(buffer.Window._fields))._replace(
        observation=start[:, None], extras={"task": np.zeros((1, 1, 5), np.float32)}
    )
    start = np.asarray(trained.agent.embed(trained.state, window)["phi"])
    assert np.abs(found[-1].arrays["phi"] - start).max(axis=1).min() < 2e-3

    run_pictures.save_feature_picture(tmp_path / "features.png", found)
    with Image.open(tmp_path / "features.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert len(colors) > 100


def test_no_snapshots_no_picture(tmp_path):
    assert snapshots.read_snapshots(tmp_path) == []
    with pytest.raises(ValueError, match="no feature snapshots"):
        run_pictures.save_feature_picture(tmp_path / "features.png", [])


def draw_curves(folder, monkeypatch, pretraining, reference=None):
    """Draws one run's curves; returns the four panels."""
    (folder / "p.csv").write_text(pretraining)
    (folder / "f.csv").write_text("frames,episode_return,eval_return_mean\n4,1,2\n")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    run_pictures.save_learning_curves(
        folder / "curves.png",
        title="some agent on Pong",
        reference=reference,
        pretrain_csv=folder / "p.csv",
        finetune_csvs={"scratch": folder / "f.csv"},
    )
    (figure,) = drawn
    assert figure.get_suptitle() == "some agent on Pong"
    return figure.axes


def labels_of(axes):
    return [line.get_label() for line in axes.lines]


def test_curves_show_what_the_agent_measured(tmp_path, monkeypatch):
    columns = "frames,episode_return,reward_new,knn_distance,loss\n"
    games, tuned, rewards, distances = draw_curves(
        tmp_path, monkeypatch, columns + "4,nan,5,7,9\n8,3,6,8,9\n"
    )
    np.testing.assert_array_equal(games.lines[0].get_xydata(), [[8, 3]])
    assert labels_of(rewards) == ["reward_new"]
    np.testing.assert_array_equal(rewards.lines[0].get_ydata(), [5, 6])
    assert labels_of(distances) == ["knn_distance"]
    assert labels_of(tuned) == ["scratch", "scratch, evaluated"]


def test_panels_without_a_curve_are_empty(tmp_path, monkeypatch):
    axes = draw_curves(tmp_path, monkeypatch, "frames,episode_return\n4,1\n")
    assert [one.get_visible() for one in axes] == [True, True, False, False]


def test_random_and_human_scores_are_drawn_where_they_are_given(tmp_path, monkeypatch):
    reference = scores.ReferenceScores(0.5, 1.5)
    text = "frames,episode_return\n4,1\n"
    games, tuned, *_ = draw_curves(tmp_path, monkeypatch, text, reference)
    assert "random" in labels_of(games) and {"random", "human"} <= set(labels_of(tuned))
    far = reference._replace(human=1e6)
    _, tuned, *_ = draw_curves(tmp_path, monkeypatch, text, far)
    assert "human" not in labels_of(tuned)
    games, tuned, *_ = draw_curves(tmp_path, monkeypatch, text)
    assert not {"random", "human"} & {*labels_of(games), *labels_of(tuned)}
