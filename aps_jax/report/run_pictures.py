"""Pictures of a run: its learning curves, its games, and the features it visited.

Letters: `N` states, `D` feature dimension.
"""

import importlib.util
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from aps_jax.runs import metrics, snapshots
from aps_jax.scores import scores

_GIF_MILLISECONDS = 70  # an agent step lasts 4/60 s; browsers round to 10 ms
_STEPS_PER_SECOND = 15  # agent steps of 4 frames, 60 frames a second
_LABEL_HEIGHT = 14  # pixels above each picture of a grid


def check_video_format(name: str) -> None:
    """Raises a `ValueError` if videos of this format cannot be written here."""
    if name == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            "mp4 videos need the package imageio-ffmpeg: pip install 'aps_jax[video]'. "
            "Gifs need nothing."
        )


def save_video(path: pathlib.Path, pictures: Sequence[np.ndarray]) -> None:
    """Writes pictures `[H, W, 3]` uint8 as a gif or an mp4, by the path's suffix.

    Raises:
      ValueError: There is no picture, or mp4 cannot be written here.
    """
    if path.suffix != ".mp4":
        save_gif(path, pictures)
        return
    check_video_format("mp4")
    import imageio_ffmpeg

    height, width = pictures[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=_STEPS_PER_SECOND,
        macro_block_size=2,  # Atari's 160x210 is no multiple of the usual 16.
        ffmpeg_log_level="error",
    )
    writer.send(None)
    for picture in pictures:
        writer.send(np.ascontiguousarray(picture))
    writer.close()


def tile(
    videos: Sequence[Sequence[np.ndarray]], labels: Sequence[str]
) -> list[np.ndarray]:
    """Lays videos side by side in a near-square grid, each under its label.

    Args:
      videos: Each a list of pictures `[H, W, 3]` uint8 of one size, at least one; a
        video that ends early keeps its last picture, darkened.
      labels: A line for each, cut where it does not fit.

    Returns:
      As many pictures as the longest video has.
    """
    from PIL import Image, ImageDraw

    num_columns = math.ceil(math.sqrt(len(videos)))
    num_rows = math.ceil(len(videos) / num_columns)
    height, width, _ = videos[0][0].shape
    blank = Image.new(
        "RGB", (num_columns * width, num_rows * (height + _LABEL_HEIGHT)), "black"
    )
    places = [
        (index % num_columns * width, index // num_columns * (height + _LABEL_HEIGHT))
        for index in range(len(videos))
    ]
    draw = ImageDraw.Draw(blank)
    for (x, y), label in zip(places, labels, strict=True):
        while draw.textlength(label) > width:
            label = label[:-1]
        draw.text((x + 1, y + 1), label, fill="white")
    made = []
    for step in range(max(map(len, videos))):
        sheet = np.array(blank)
        for (x, y), video in zip(places, videos, strict=True):
            picture = video[step] if step < len(video) else video[-1] // 2
            y += _LABEL_HEIGHT
            sheet[y : y + height, x : x + width] = picture
        made.append(sheet)
    return made


def save_gif(path: pathlib.Path, pictures: Sequence[np.ndarray]) -> None:
    """Writes pictures `[H, W, 3]` uint8 as a gif that plays at the game's speed.

    Raises:
      ValueError: There is no picture.
    """
    from PIL import Image  # Pure users of the module's curves need no imaging library.

    if not pictures:
        raise ValueError("A gif needs at least one picture.")
    images = [Image.fromarray(picture) for picture in pictures]
    # One palette for the whole game (of its most colourful picture), or colours flicker.
    richest = max(images[:: max(1, len(images) // 50)], key=_num_colors)
    palette = richest.quantize(colors=128)
    frames = [image.quantize(palette=palette, dither=0) for image in images]
    frames[0].save(
        path,
        save_all=True,
        append_images=frames[1:],
        duration=_GIF_MILLISECONDS,
        loop=0,
        optimize=False,
    )


def _num_colors(image) -> int:
    return len(image.getcolors(maxcolors=1 << 24) or ())


def save_learning_curves(
    path: pathlib.Path,
    *,
    game: str,
    pretrain_csv: pathlib.Path | None,
    finetune_csvs: dict[str, pathlib.Path],
) -> None:
    """Draws how a run went: scores above, the reward-free signals below.

    Args:
      path: The png to write.
      game: The game, whose random and human scores are drawn.
      pretrain_csv: Metrics of the pretraining, if there was one.
      finetune_csvs: Metrics of each fine-tuning by the name of its arm.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    figure.suptitle(f"APS on {game}")
    reference = scores.find_reference_scores(game)
    for axis in axes[0]:
        axis.set_ylabel("score (points)")
        if reference is not None:
            axis.axhline(reference.random, color="grey", ls=":", label="random")
    _draw_pretraining(axes, pretrain_csv)
    axis = axes[0][1]
    axis.set_title("fine-tuning: games while learning, and evaluations")
    axis.set_xlabel("frames with reward")
    for index, (arm, csv_path) in enumerate(finetune_csvs.items()):
        columns = metrics.read_metrics(csv_path)
        color = f"C{index}"
        _line(axis, columns, "episode_return", color=color, alpha=0.5, label=arm)
        frames, means = _known(columns, "eval_return_mean")
        # The later arms' marks are smaller: none hides another of the same score.
        size = max(11 - 5 * index, 4)
        label = f"{arm}, evaluated"
        axis.plot(frames, means, "o", color=color, markersize=size, label=label)
    if reference is not None and _is_near(axis, reference.human):
        axis.axhline(reference.human, color="black", ls="--", label="human")
    axis.legend(fontsize="small")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_feature_picture(
    path: pathlib.Path, visited: Sequence[snapshots.Snapshot]
) -> None:
    """Draws the visited part of the feature sphere at up to six moments of pretraining.

    The sphere is seen from outside: points are projected onto the plane in which the
    last snapshot's features vary most (`snapshots.plane_of`), the circle is the
    sphere's outline. The colour is the direction, in that plane, of the task under
    which a state was reached: where features tell the tasks apart, each colour gathers
    on its own side, as in the small wheel.

    Args:
      path: The png to write.
      visited: From `snapshots.read_snapshots`, at least one.

    Raises:
      ValueError: There is none.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not visited:
        raise ValueError("There are no feature snapshots to draw.")
    chosen = [
        visited[index]
        for index in sorted({round(i * (len(visited) - 1) / 5) for i in range(6)})
    ]
    plane = snapshots.plane_of(visited[-1].arrays["phi"])
    figure, axes = plt.subplots(
        1,
        len(chosen) + 1,
        figsize=(2.3 * len(chosen) + 1.2, 3.0),
        layout="constrained",
        width_ratios=[1.0] * len(chosen) + [0.5],
        squeeze=False,
    )
    last = chosen[-1].arrays["phi"] - chosen[-1].arrays["phi"].mean(axis=0)
    share = np.square(last @ plane).sum() / max(np.square(last).sum(), 1e-12)
    figure.suptitle(
        "Visited states on the feature sphere, seen in the plane of their largest "
        f"variation ({100 * share:.0f} % of it at the end)",
        fontsize="medium",
    )
    for axis, snapshot in zip(axes[0], chosen, strict=False):
        points, w = snapshot.arrays["phi"] @ plane, snapshot.arrays["task"] @ plane
        axis.scatter(
            points[:, 0],
            points[:, 1],
            c=np.arctan2(w[:, 1], w[:, 0]),
            cmap="hsv",
            vmin=-math.pi,
            vmax=math.pi,
            s=9,
            alpha=0.8,
            linewidths=0,
        )
        axis.set_title(f"{snapshot.agent_steps:,} agent steps", fontsize="small")
    angles = np.linspace(-math.pi, math.pi, 60, endpoint=False)
    wheel = axes[0][-1]
    wheel.scatter(np.cos(angles), np.sin(angles), c=angles, cmap="hsv", s=25)
    wheel.set_title("task", fontsize="small")
    for axis in axes[0]:
        if axis is not wheel:
            axis.add_patch(plt.Circle((0, 0), 1.0, fill=False, color="grey", lw=0.8))
        axis.set_aspect("equal")
        axis.set_xlim(-1.15, 1.15)
        axis.set_ylim(-1.15, 1.15)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_pretraining(axes, pretrain_csv: pathlib.Path | None) -> None:
    axes[0][0].set_title("pretraining: score, which the agent never sees")
    axes[1][0].set_title("pretraining: both halves of its reward")
    axes[1][1].set_title("pretraining: distances to the nearest particles")
    for axis in (axes[0][0], *axes[1]):
        axis.set_xlabel("frames without reward")
    if pretrain_csv is None:
        return
    columns = metrics.read_metrics(pretrain_csv)
    _line(axes[0][0], columns, "episode_return", color="C0", label="games")
    _line(axes[1][0], columns, "reward_skill", color="C1", label="skill phi^T w")
    _line(axes[1][0], columns, "reward_entropy", color="C2", label="entropy")
    _line(axes[1][1], columns, "knn_distance", color="C3", label="mean of k nearest")
    _line(axes[1][1], columns, "distance_scale", color="C4", label="running mean")
    for axis in axes[1]:
        axis.legend(fontsize="small")


def _known(
    columns: dict[str, list[float]], name: str
) -> tuple[list[float], list[float]]:
    pairs = [
        (frame, value)
        for frame, value in zip(columns["frames"], columns[name], strict=True)
        if not math.isnan(value)
    ]
    return [frame for frame, _ in pairs], [value for _, value in pairs]


def _line(axis, columns: dict[str, list[float]], name: str, **style) -> None:
    axis.plot(*_known(columns, name), **style)


def _is_near(axis, value: float) -> bool:
    """Whether drawing `value` would not squeeze the curves into a corner."""
    low, high = axis.get_ylim()
    return low - 3 * (high - low) <= value <= high + 3 * (high - low)
