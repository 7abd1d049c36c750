r"""Measures the encoders, forward and backward, by form of the convolutions.

  python -m experiments.bench_encoders [--encoders=small,nature] [--batches=32,256]

Prints images per second of each encoder, batch and form: `chosen` is what
`convolutions.choose_plan` gives on this backend, the others are what it was chosen
from, and PyTorch is the yardstick on the same cores. Every row is the median over
repetitions in which all forms take turns, so that ratios hold on a busy machine too.
PyTorch (`pip install torch`) is needed for its own rows alone.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from aps_jax.networks import convolutions, modules
from aps_jax.runs import machine

try:
    import torch
except ImportError:
    torch = None

ENCODERS: Mapping[str, Callable[..., Any]] = {
    "small": modules.SmallEncoder,
    "nature": modules.NatureEncoder,
    "paper": modules.PaperEncoder,
}
IMAGE_SHAPE = (84, 84, 4)
NO_TORCH = "PyTorch is not installed: its rows and the ratios to it are left out."

_ENCODERS = flags.DEFINE_list(
    "encoders", list(ENCODERS), "Encoders to measure, separated by commas."
)
_BATCHES = flags.DEFINE_list(
    "batches", ["32", "256"], "Images per step, numbers separated by commas."
)
_TURNS = flags.DEFINE_integer(
    "turns", 7, "Turns that each form takes; the median counts.", lower_bound=5
)
_TURN_SECONDS = flags.DEFINE_float(
    "turn_seconds", 0.3, "Seconds that each turn takes at least.", lower_bound=0.0
)


class Row(NamedTuple):
    """One form of one encoder at one batch size."""

    encoder: str
    batch: int  # Images.
    form: str
    images_per_second: float  # Forward and backward, median over repetitions.
    ratio_to_torch: float | None  # To PyTorch's faster layout, None without PyTorch.


def plans(encoder: str) -> dict[str, convolutions.Plan]:
    """Returns the plans to compare for one encoder, by name."""
    layers = ENCODERS[encoder].layers
    chosen = convolutions.choose_plan(jax.default_backend(), IMAGE_SHAPE, layers)
    xla = convolutions.Plan((convolutions.convolve_xla,) * len(layers), None)
    windows = convolutions.Plan((convolutions.convolve_windows,) * len(layers), None)
    return {"chosen": chosen, "xla": xla, "windows": windows}


def _make_jax_step(
    encoder: str,
    plan: convolutions.Plan,
    params: Mapping[str, Any],
    images: np.ndarray,
    cotangent: np.ndarray,
) -> Callable[[], Any]:
    """Returns a function that computes output and parameter gradients once."""
    module = ENCODERS[encoder](plan=plan)

    @jax.jit
    def step(params, images, cotangent):
        encode = functools.partial(module.apply, observation=images)
        output, pull_back = jax.vjp(encode, params)
        return output, pull_back(cotangent)

    operands = jax.device_put((params, images, cotangent))
    return lambda: jax.block_until_ready(step(*operands))


def _torch_forward(encoder: str, weights: Mapping[str, Any], images: Any) -> Any:
    """Computes an encoder in PyTorch from weights in PyTorch's layouts."""
    functional = torch.nn.functional
    activation = functional.elu if encoder == "paper" else functional.relu
    x = images.float() * (1.0 / 255.0)
    for index, layer in enumerate(ENCODERS[encoder].layers):
        if layer.is_padded:
            rows, columns = (-side % layer.stride for side in x.shape[2:])
            x = functional.pad(x, (0, columns, 0, rows))
        kernel, bias = weights[f"conv_{index}"]
        x = activation(functional.conv2d(x, kernel, bias, stride=layer.stride))
    x = x.flatten(1)
    if "hidden" in weights:
        x = activation(functional.linear(x, *weights["hidden"]))
    return x


def _torch_weights(encoder: str, params: Mapping[str, Any], memory_format: Any) -> Any:
    """Converts parameters to PyTorch's layouts, so that the networks are the same."""

    def leaf(array: np.ndarray) -> Any:
        return torch.from_numpy(np.array(array))

    weights = {}
    channels = IMAGE_SHAPE[-1]
    for index, layer in enumerate(ENCODERS[encoder].layers):
        conv = jax.device_get(params["params"][f"conv_{index}"])
        kernel = leaf(conv["kernel"].transpose(3, 2, 0, 1))
        weights[f"conv_{index}"] = (
            kernel.to(memory_format=memory_format),
            leaf(conv["bias"]),
        )
        channels = layer.features
    if "hidden" in params["params"]:
        hidden = jax.device_get(params["params"]["hidden"])
        num_inputs, num_units = hidden["kernel"].shape
        side = round((num_inputs // channels) ** 0.5)
        kernel = hidden["kernel"].reshape(side, side, channels, num_units)
        kernel = kernel.transpose(3, 2, 0, 1).reshape(num_units, num_inputs)
        weights["hidden"] = (leaf(kernel), leaf(hidden["bias"]))
    for tensors in weights.values():
        for tensor in tensors:
            tensor.requires_grad_()
    return weights


def _make_torch_step(
    encoder: str,
    memory_format: Any,
    params: Mapping[str, Any],
    images: np.ndarray,
    cotangent: np.ndarray,
) -> Callable[[], Any]:
    """Returns a function that computes output and parameter gradients once."""
    weights = _torch_weights(encoder, params, memory_format)
    leaves = [tensor for tensors in weights.values() for tensor in tensors]
    nchw = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    nchw = nchw.contiguous(memory_format=memory_format)
    if "hidden" not in weights:  # Flattened in another order.
        side = round((cotangent.shape[1] // 32) ** 0.5)
        cotangent = cotangent.reshape(-1, side, side, 32).transpose(0, 3, 1, 2)
        cotangent = cotangent.reshape(images.shape[0], -1)
    pulled = torch.from_numpy(np.array(cotangent))

    def step():
        output = _torch_forward(encoder, weights, nchw)
        return output, torch.autograd.grad(output, leaves, pulled)

    return step


def use_all_cores() -> None:
    """Lets PyTorch use the cores that this process may, as JAX does."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def make_steps(
    encoder: str, batch: int, forms: Sequence[str] | None = None
) -> dict[str, Callable[[], Any]]:
    """Makes one step per form, all of the same network on the same images.

    Args:
      encoder: a name of `ENCODERS`.
      batch: images per step.
      forms: of `plans`, all by default.

    Returns:
      Functions by form; those of PyTorch are missing where it is not installed.
    """
    rng = np.random.default_rng(seed=0)
    images = rng.integers(0, 256, size=(batch, *IMAGE_SHAPE), dtype=np.uint8)
    module = ENCODERS[encoder]()
    output, params = jax.jit(module.init_with_output)(jax.random.key(0), images[:1])
    cotangent = rng.normal(size=(batch, output.shape[-1])).astype(np.float32)
    steps = {
        name: _make_jax_step(encoder, plan, params, images, cotangent)
        for name, plan in plans(encoder).items()
        if forms is None or name in forms
    }
    if torch is not None:
        use_all_cores()
        for name, memory_format in (
            ("torch", torch.contiguous_format),
            ("torch channels last", torch.channels_last),
        ):
            steps[name] = _make_torch_step(
                encoder, memory_format, params, images, cotangent
            )
    return steps


def _seconds_per_step(step: Callable[[], Any], seconds: float) -> float:
    """Times steps for at least `seconds`, after one that nobody times."""
    step()
    num_steps = 0
    start = time.perf_counter()
    while num_steps == 0 or time.perf_counter() - start < seconds:
        step()
        num_steps += 1
    return (time.perf_counter() - start) / num_steps


def measure(
    encoders: Sequence[str],
    batches: Sequence[int],
    *,
    repetitions: int,
    seconds: float,
    forms: Sequence[str] | None = None,
) -> list[Row]:
    """Measures forward and backward passes, all forms taking turns.

    Args:
      encoders: names of `ENCODERS`.
      batches: images per step.
      repetitions: turns per form, at least 1.
      seconds: that each turn takes at least.
      forms: of `plans`, all by default; PyTorch's are always there.

    Returns:
      One row per encoder, batch and form.

    Raises:
      ValueError: for an unknown encoder, or where there is nothing to measure.
    """
    unknown = [name for name in encoders if name not in ENCODERS]
    if unknown:
        raise ValueError(f"encoders are {', '.join(ENCODERS)}, got {unknown}.")
    if repetitions < 1 or any(batch < 1 for batch in batches):
        raise ValueError(f"nothing to do: {repetitions=}, batches {list(batches)}.")

    rows = []
    for encoder in encoders:
        for batch in batches:
            steps = make_steps(encoder, batch, forms)
            turns = {name: [] for name in steps}
            for _ in range(repetitions):
                for name, step in steps.items():
                    turns[name].append(_seconds_per_step(step, seconds))
            rates = {name: batch / statistics.median(t) for name, t in turns.items()}
            of_torch = [r for name, r in rates.items() if name.startswith("torch")]
            for name, rate in rates.items():
                ratio = rate / max(of_torch) if of_torch else None
                rows.append(Row(encoder, batch, name, rate, ratio))
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """Formats rows as a table, with a line that says so where PyTorch is missing."""
    lines = [f"{'encoder':8} {'batch':>5}  {'form':20} {'images/s':>9}  to PyTorch"]
    for row in rows:
        ratio = "-" if row.ratio_to_torch is None else f"{row.ratio_to_torch:.2f}"
        lines.append(
            f"{row.encoder:8} {row.batch:5d}  {row.form:20} "
            f"{row.images_per_second:9,.0f}  {ratio:>10}"
        )
    if all(row.ratio_to_torch is None for row in rows):
        lines.append(NO_TORCH)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    machine.tune_allocator()
    try:
        batches = [int(batch) for batch in _BATCHES.value]
        rows = measure(
            _ENCODERS.value,
            batches,
            repetitions=_TURNS.value,
            seconds=_TURN_SECONDS.value,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(format_rows(rows))


if __name__ == "__main__":
    app.run(main)
