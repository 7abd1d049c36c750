r"""Uses some minutes on a GPU to the full: checks, measurements, then a run.

  python -m experiments.gpu_minutes --workdir=runs/gpu --files=out [--minutes=9] [--dry]

By the clock: each part has a limit, what is left goes to pretraining one game, with
fine-tuning and 100 games at the end. Each part is a process of its own, whose failure
or end by the clock stops no other. FILES gets at most eight files, each as soon as it
exists (docs/devices.md). `--dry` does all of it on a CPU in the smallest size.
"""

import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from aps_jax.runs import folders
from aps_jax.train import stages
from experiments import common_flags

_OUT = flags.DEFINE_string("files", None, "Folder that gets what was found.")
_MINUTES = flags.DEFINE_float(
    "minutes", 9.0, "Minutes that all of it may take.", lower_bound=0.1
)
_DRY = flags.DEFINE_bool("dry", False, "The smallest sizes, on any device.")
_GAME = flags.DEFINE_string("minutes_game", "Pong", "Atari game of the run.")

_LARGEST = 16 * 2**20  # bytes of a file
_GRACE = 15.0  # seconds from a request to stop to the end
_LEAST = 5.0  # seconds below which nothing is begun


class Part(NamedTuple):
    """A process, its limit, and the files that it leaves."""

    name: str
    words: tuple[str, ...]  # of Python
    seconds: float  # at most
    kept: Mapping[str, pathlib.Path]  # by the name there
    is_stage: bool = False  # whether it takes `--max_minutes`


def main(argv: Sequence[str]) -> None:
    """Runs all parts."""
    common_flags.reject_words(argv)
    if not _OUT.value:
        raise ValueError("--files=FOLDER is needed: what was found goes there.")
    # Its processes need the device's memory, of which this one must take none.
    jax.config.update("jax_platforms", "cpu")
    workdir, out = common_flags.workdir_from_flags(), folders.as_path(_OUT.value)
    parts = make_parts(workdir, 60.0 * _MINUTES.value, _GAME.value, dry=_DRY.value)
    run_parts(parts, out, 60.0 * _MINUTES.value)
    save_weights(workdir, out / "weights.npz")


def make_parts(
    workdir: pathlib.Path, seconds: float, game: str, *, dry: bool
) -> list[Part]:
    """Lists the parts in the order of their worth; shares of `seconds` are limits."""
    workdir.mkdir(parents=True, exist_ok=True)
    preset, small = ("smoke", ["--small"]) if dry else ("gpu", [])
    # Skill following is measured with each checkpoint.
    checked = (
        [] if dry else ["--require_accelerator", "--checkpoint_agent_steps=500000"]
    )

    def script(name: str, *words: str) -> tuple[str, ...]:
        return ("-m", f"experiments.{name}", *words)

    def checks(part: str, share: float) -> Part:
        path = workdir / f"{part}.json"
        words = script("gpu_checks", f"--part={part}", f"--found={path}", *small)
        return Part(part, words, share * seconds, {path.name: path})

    def rates(name: str, *words: str) -> Part:
        options = [f"--preset={preset}", *words, "--preflight", "--preflight_seconds=5"]
        folder = f"--workdir={workdir / name}"
        return Part(name, script("pretrain", *options, folder), 0.08 * seconds, {})

    benchmark, pretrained = workdir / "benchmark", workdir / "pretrain"
    finetuned, rows = workdir / "finetune", "knn" if dry else "full,acting,knn,scaling"
    world = ["--game=maze/four_rooms", "--encoder=mlp"]
    return [
        checks("numerics", 0.16),
        checks("loop", 0.12),
        Part(
            "benchmark",
            script(
                *("benchmark", f"--rows={rows}", f"--workdir={benchmark}"),
                f"--size={'smoke' if dry else 'full'}",
            ),
            0.2 * seconds,
            {"benchmark.json": benchmark / "benchmark.json"},
        ),
        rates("worlds", *world),
        rates("seeds", *world, "--num_seeds=4"),
        Part(
            "pretrain",
            script(
                *("pretrain", f"--preset={preset}", f"--game={game}", *checked),
                *("--nocheckpoint_replay", f"--workdir={pretrained}"),
            ),
            seconds,
            {"pretrain.csv": pretrained / "metrics.csv"},
            is_stage=True,
        ),
        Part(
            "finetune",
            script(
                *("finetune", f"--init={pretrained}", f"--workdir={finetuned}"),
                "--nocheckpoint_replay",
            ),
            seconds,
            {
                "finetune.csv": finetuned / "metrics.csv",
                "result.json": finetuned / folders.RESULT_NAME,
            },
            is_stage=True,
        ),
    ]


# What of the time that is left pretraining gets; the rest is fine-tuning's.
_PRETRAIN_SHARE = 0.55


def run_parts(parts: Sequence[Part], out: pathlib.Path, seconds: float) -> list[str]:
    """Runs parts one after another until the time is over; returns what became of them.

    Args:
      parts: What to run.
      out: Folder of the files, made if it does not exist.
      seconds: For all.
    """
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    with (out / "log.txt").open("w") as log:
        for place, part in enumerate(parts):
            left = deadline - time.monotonic() - _GRACE
            if part.is_stage and place < len(parts) - 1:
                left *= _PRETRAIN_SHARE
            limit = min(part.seconds, left)
            if limit < _LEAST:
                lines.append(f"{part.name}: not begun, {limit:.0f} s were left")
            else:
                words = [sys.executable, *part.words]
                if part.is_stage:
                    words.append(f"--max_minutes={limit / 60.0:.3f}")
                started = time.monotonic()
                code = _run(words, log, limit)
                took = time.monotonic() - started
                lines.append(f"{part.name}: code {code}, {took:.0f} s")
            print(lines[-1], flush=True)
            log.write(f"--- {lines[-1]}\n")
            log.flush()
            for name, path in part.kept.items():
                if path.exists() and path.stat().st_size <= _LARGEST:
                    shutil.copy(path, out / name)
    return lines


def _run(words: Sequence[str], log, limit: float) -> int:
    """Runs a process, whose end is asked for at the limit and then made."""
    with subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT) as process:
        for seconds, end in ((limit, process.terminate), (_GRACE, process.kill)):
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                end()
        return process.wait()


def save_weights(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Saves the networks of the newest agent alone, as arrays by name."""
    for name, load in (
        ("finetune", stages.load_finetuned),
        ("pretrain", stages.load_pretrained),
    ):
        try:
            params = load(workdir / name, warn=common_flags.warn).state.params
        except ValueError:
            continue
        arrays = {
            jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(x)
            for place, x in jax.tree_util.tree_leaves_with_path(params)
        }
        np.savez_compressed(path, allow_pickle=False, **arrays)
        if path.stat().st_size > _LARGEST:
            print(f"warning: {path} is larger than {_LARGEST} bytes", file=sys.stderr)
        return
    print("No agent was trained.")


if __name__ == "__main__":
    common_flags.run(main, short=("workdir",))
