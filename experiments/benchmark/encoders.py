"""The encoders, forward and backward, and the same networks in PyTorch."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from aps_jax.agents.base import ENCODERS

IMAGE_SHAPE = (84, 84, 4)


@functools.cache
def torch() -> Any:
    """Returns PyTorch, imported when first needed; None if it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


# The steps of both libraries compute the output and the parameters' gradients once.


def _make_jax_step(
    encoder: str, params: Mapping[str, Any], images: np.ndarray, cotangent: np.ndarray
) -> Callable[[], Any]:
    module = ENCODERS[encoder]()

    @jax.jit
    def step(params, images, cotangent):
        encode = functools.partial(module.apply, observation=images)
        output, pull_back = jax.vjp(encode, params)
        return output, pull_back(cotangent)

    operands = jax.device_put((params, images, cotangent))
    return lambda: jax.block_until_ready(step(*operands))


def _torch_forward(encoder: str, weights: Mapping[str, Any], images: Any) -> Any:
    """Computes an encoder in PyTorch from weights in PyTorch's layouts."""
    functional = torch().nn.functional
    activation = functional.elu if encoder == "paper" else functional.relu
    x = images.float() * (1.0 / 255.0)
    for index, layer in enumerate(ENCODERS[encoder].layers):
        rows, columns = map(layer.zeros, x.shape[2:])
        x = functional.pad(x, (*columns, *rows))
        kernel, bias = weights[f"conv_{index}"]
        x = activation(functional.conv2d(x, kernel, bias, stride=layer.stride))
    x = x.flatten(1)
    if "hidden" in weights:
        x = activation(functional.linear(x, *weights["hidden"]))
    return x


def _torch_weights(encoder: str, params: Mapping[str, Any], memory_format: Any) -> Any:
    """Converts parameters to PyTorch's layouts, so that the networks are the same."""

    def leaf(array: np.ndarray) -> Any:
        return torch().from_numpy(np.array(array))

    weights = {}
    channels = IMAGE_SHAPE[-1]
    for index, layer in enumerate(ENCODERS[encoder].layers):
        conv = jax.device_get(params["params"][f"conv_{index}"])
        kernel = leaf(conv["kernel"].transpose(3, 2, 0, 1))
        kernel = kernel.to(memory_format=memory_format)
        weights[f"conv_{index}"] = (kernel, leaf(conv["bias"]))
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
    weights = _torch_weights(encoder, params, memory_format)
    leaves = [tensor for tensors in weights.values() for tensor in tensors]
    nchw = torch().from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    nchw = nchw.contiguous(memory_format=memory_format)
    if "hidden" not in weights:  # Flattened in another order.
        side = round((cotangent.shape[1] // 32) ** 0.5)
        cotangent = cotangent.reshape(-1, side, side, 32).transpose(0, 3, 1, 2)
        cotangent = cotangent.reshape(images.shape[0], -1)
    pulled = torch().from_numpy(np.array(cotangent))

    def step():
        output = _torch_forward(encoder, weights, nchw)
        return output, torch().autograd.grad(output, leaves, pulled)

    return step


def use_all_cores() -> None:
    """Lets PyTorch use the cores that this process may, as JAX does."""
    torch().set_num_threads(len(os.sched_getaffinity(0)))


def make_steps(encoder: str, batch: int) -> dict[str, Callable[[], Any]]:
    """Makes a step of ours and two of PyTorch's, all of the same network and images.

    Args:
      encoder: a name of `ENCODERS`.
      batch: images per step.

    Returns:
      Functions by name; those of PyTorch are missing where it is not installed.
    """
    rng = np.random.default_rng(seed=0)
    images = rng.integers(0, 256, size=(batch, *IMAGE_SHAPE), dtype=np.uint8)
    module = ENCODERS[encoder]()
    output, params = jax.jit(module.init_with_output)(jax.random.key(0), images[:1])
    cotangent = rng.normal(size=(batch, output.shape[-1])).astype(np.float32)
    operands = (params, images, cotangent)
    steps = {"ours": _make_jax_step(encoder, *operands)}
    if torch() is not None:
        use_all_cores()
        formats = {
            "torch": torch().contiguous_format,
            "torch channels last": torch().channels_last,
        }
        for name, memory_format in formats.items():
            steps[name] = _make_torch_step(encoder, memory_format, *operands)
    return steps
