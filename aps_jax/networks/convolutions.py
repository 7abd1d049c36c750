"""Forms of a convolution that agree in value and differ in speed, and their choice.

Every form computes the same unpadded strided correlation, the "convolution" of deep
learning,

    y[b, i, j, o] = sum_{u, v, c} x[b, s i + u, s j + v, c] kernel[u, v, c, o],

with stride `s`, and its gradients, so a checkpoint made with one form works with every
other. `choose_plan` is the only place that decides which form a platform uses, that
for which a program is compiled and not that of the process.

Letters: `B` batch, `H`/`W` height and width of the images, `h`/`w` of the result,
`C`/`O` channels in and out, `P`/`Q` height and width of the kernel.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from aps_jax.types import Array

Convolution: TypeAlias = Callable[..., jax.Array]
Activation: TypeAlias = Callable[[jax.Array], jax.Array]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# What the gathered windows of one chunk of images may take. The matrix products run
# at their full speed while their operands stay in the caches of the cores; fewer chunks
# copy less between the loop and what it keeps for the gradient.
_CHUNK_BYTES = 8 * 2**20
# Above this, gathering the windows of a single image costs more than their product.
_GATHER_BYTES = 2**20


class LayerShape(NamedTuple):
    """What a convolutional layer is before it sees its parameters."""

    features: int  # O, channels out.
    side: int  # P = Q, height and width of the kernel.
    stride: int  # Pixels between neighbouring outputs, in both directions.
    # VALID: none. WHOLE: zeros up to whole strides, below and on the right. SAME: zeros
    # on all sides, one output for each stride begun.
    padding: str = "VALID"

    def zeros(self, length: int) -> tuple[int, int]:
        """Returns the zeros before and behind a row of `length` pixels."""
        if self.padding == "SAME":
            last = (length - 1) // self.stride * self.stride
            total = max(last + self.side - length, 0)
            return total // 2, total - total // 2
        return 0, -length % self.stride if self.padding == "WHOLE" else 0


class LayerWeights(NamedTuple):
    """The parameters of one layer, in the layout of `flax.linen.Conv`."""

    kernel: jax.Array  # [P, Q, C, O] float32.
    bias: jax.Array  # [O] float32.


class Plan(NamedTuple):
    """How a platform computes a stack of layers; never what it computes."""

    forms: tuple[Convolution, ...]  # One per layer.
    chunk_size: int | None  # Images that pass all layers together; None: the batch.


def convolve_xla(images: Array, kernel: Array, *, stride: int) -> jax.Array:
    """Convolves by XLA's own operation and its own gradients.

    Args:
      images: `[B, H, W, C]` of the kernel's dtype, or uint8, which is converted.
      kernel: `[P, Q, C, O]` float.
      stride: pixels between neighbouring outputs, at least 1.

    Returns:
      `[B, (H - P) // stride + 1, (W - Q) // stride + 1, O]` of the kernel's dtype.
    """
    return _xla_forward(images.astype(kernel.dtype), kernel, (stride, stride))


def _xla_forward(images, kernel, strides, padding=((0, 0), (0, 0))) -> jax.Array:
    """Applies XLA's convolution in the one layout that every backend does well."""
    return jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_DIMENSIONS
    )


def _gather_windows(
    images: jax.Array, rows: int, columns: int, stride: int
) -> jax.Array:
    """Gathers the window of every output: `[B, H, W, C] -> [B, h, w, P * Q * C]`."""
    batch, height, width, channels = images.shape
    span = stride * ((height - rows) // stride) + 1
    # Pixels that always move together are seen as one, so that long runs are copied:
    # whole strides where they fill the kernel, 2 x 16 numbers a row for 8x8/4.
    run = stride if columns % stride == 0 else 1
    images = images[:, :, : width // run * run].reshape(
        batch, height, width // run, run * channels
    )
    step = stride // run
    width_span = step * ((width - columns) // stride) + 1
    windows = [
        images[:, u : u + span : stride, v : v + width_span : step]
        for u in range(rows)
        for v in range(columns // run)
    ]
    return jnp.concatenate(windows, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_windows(images: Array, kernel: Array, stride: int) -> jax.Array:
    """Convolves by gathering each window into a row of a matrix product (im2col).

    Its gradients are matrix products too: the kernel's of the result's gradient with
    the windows gathered anew, the images' scattered back. Where the kernel's side
    equals the stride, gathering is a transposition. First-order reverse-mode
    differentiation only.

    Args and result as in `convolve_xla`.
    """
    return _windows_forward(images, kernel, stride)[0]


def _windows_forward(images, kernel, stride):
    rows, columns, _, features = kernel.shape
    # Gathered as bytes where images are bytes, and converted after.
    windows = _gather_windows(images, rows, columns, stride)
    result = windows.astype(kernel.dtype) @ kernel.reshape(-1, features)
    # Bytes are kept for the gradient: reading them takes less time than gathering anew.
    # Windows of floats take four times the room, and are gathered faster.
    kept = images if jnp.issubdtype(images.dtype, jnp.floating) else windows
    return result, (kept, kernel)


def _windows_backward(stride, residuals, cotangent):
    kept, kernel = residuals
    rows, columns, _, features = kernel.shape
    gather = functools.partial(
        _gather_windows, rows=rows, columns=columns, stride=stride
    )
    is_differentiable = jnp.issubdtype(kept.dtype, jnp.floating)
    windows = gather(kept) if is_differentiable else kept
    windows = windows.astype(kernel.dtype).reshape(-1, windows.shape[-1])
    kernel_grad = _transposed_product(cotangent.reshape(-1, features), windows)
    kernel_grad = kernel_grad.T.reshape(kernel.shape)
    if not is_differentiable:
        return None, kernel_grad
    (images_grad,) = jax.linear_transpose(gather, kept)(
        cotangent @ kernel.reshape(-1, features).T
    )
    return images_grad, kernel_grad


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes `x^T y` by a product of matrices that lie in the order of memory.

    XLA would merge the transpositions before and behind it into the product, for which
    its CPU backend has no fast kernel: on two cores the Nature encoder's gradient takes
    an eighth longer.
    """
    transposed = jax.lax.optimization_barrier(x.T)
    return jax.lax.optimization_barrier(transposed @ y)


convolve_windows.defvjp(_windows_forward, _windows_backward)


@jax.custom_vjp
def _forward_only(images: jax.Array, kernel: jax.Array) -> jax.Array:
    # XLA of JAX 0.10 gives a convolution whose result is no larger than its images to a
    # library that keeps it on one core. Zeros below make the result larger; the rows
    # that saw them are cut off.
    rows = kernel.shape[0]
    return _xla_forward(images, kernel, (1, 1), ((0, rows), (0, 0)))[:, :-rows]


def _forward_only_forward(images, kernel):
    return _forward_only(images, kernel), (images, kernel)


def _forward_only_backward(residuals, cotangent):
    images, kernel = residuals
    rows, columns, _, _ = kernel.shape
    images_grad = _xla_forward(
        cotangent,
        kernel[::-1, ::-1].swapaxes(2, 3),
        (1, 1),
        ((rows - 1, rows - 1), (columns - 1, columns - 1)),
    )
    # The kernel's gradient correlates images and cotangent over the batch: channels
    # take the place of the batch. Transposed in memory, not in the dimension numbers,
    # for which XLA's CPU backend has no fast path inside of loops.
    kernel_grad = _xla_forward(
        jax.lax.optimization_barrier(images.transpose(3, 1, 2, 0)),  # [C, H, W, B]
        jax.lax.optimization_barrier(cotangent.transpose(1, 2, 0, 3)),  # [h, w, B, O]
        (1, 1),
    )
    return images_grad, kernel_grad.transpose(1, 2, 0, 3)


_forward_only.defvjp(_forward_only_forward, _forward_only_backward)


def convolve_forward_only(images: Array, kernel: Array, *, stride: int) -> jax.Array:
    """Convolves by XLA's operation, both gradients written as forward convolutions.

    XLA's CPU backend computes a forward convolution well and its gradients badly,
    inside of loops by a factor of 50. First-order reverse-mode differentiation only.

    Args and result as in `convolve_xla`, with a stride of 1.

    Raises:
      ValueError: if the stride is not 1.
    """
    if stride != 1:
        raise ValueError(f"stride must be 1, got {stride}.")
    return _forward_only(images.astype(kernel.dtype), kernel)


def _output_side(side: int, layer: LayerShape) -> int:
    """Returns how many outputs a layer makes of a row of `side` pixels."""
    side += sum(layer.zeros(side))
    return (side - layer.side) // layer.stride + 1


def choose_plan(
    platform: str, image_shape: tuple[int, int, int], layers: Sequence[LayerShape]
) -> Plan:
    """Chooses forms and chunk size for one platform.

    Accelerators take XLA's own convolutions (cuDNN) on the whole batch. CPUs take
    products of gathered windows, a few images at a time, but no windows where those
    of a single image would take more than `_GATHER_BYTES` (docs/performance.md).

    Args:
      platform: `cpu`, or any other.
      image_shape: `(H, W, C)`.
      layers: from the image on.

    Returns:
      The plan, for float32; half as wide types fit all the better.
    """
    if platform != "cpu":
        return Plan(forms=(convolve_xla,) * len(layers), chunk_size=None)
    height, width, channels = image_shape
    forms = []
    largest = 1
    for layer in layers:
        height, width = _output_side(height, layer), _output_side(width, layer)
        num_bytes = 4 * height * width * layer.side**2 * channels
        use_windows = layer.stride > 1 or num_bytes <= _GATHER_BYTES
        forms.append(convolve_windows if use_windows else convolve_forward_only)
        largest = max(largest, num_bytes)
        channels = layer.features
    # A power of two, as batches are, so that no odd rest is left over.
    chunk_size = 2 ** int(math.log2(max(1, _CHUNK_BYTES // largest)))
    return Plan(forms=tuple(forms), chunk_size=chunk_size)


@jax.custom_vjp
def elu(x: jax.Array) -> jax.Array:
    """Returns x above 0 and e^x - 1 below.

    Not by expm1: its relative accuracy near 0 serves nothing here and takes as long as
    a convolution on CPUs. The slope is computed from the output alone: a layer keeps
    one array for its gradient, which the next one needs anyway.
    """
    return jnp.where(x > 0.0, x, jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


def _elu_forward(x):
    y = elu(x)
    return y, y


def _elu_backward(y, cotangent):
    return (cotangent * jnp.where(y > 0.0, jnp.ones_like(y), y + 1.0),)


elu.defvjp(_elu_forward, _elu_backward)


def _in_chunks(
    function: Callable[[jax.Array], jax.Array], images: jax.Array, size: int | None
) -> jax.Array:
    """Applies a function of a batch to chunks of it, one after the other."""
    batch = images.shape[0]
    if size is None or batch <= size:
        return function(images)
    num_chunks = batch // size
    split = num_chunks * size
    chunks = images[:split].reshape(num_chunks, size, *images.shape[1:])
    results = jax.lax.map(function, chunks)
    results = results.reshape(split, *results.shape[2:])
    if split == batch:
        return results
    return jnp.concatenate([results, function(images[split:])])


def apply_layers(
    images: Array,
    weights: Sequence[LayerWeights],
    *,
    layers: Sequence[LayerShape],
    activation: Activation,
    dtype: jnp.dtype,
    plan: Plan | None = None,
) -> jax.Array:
    """Applies convolutional layers, each `activation(convolution + bias)`.

    Args:
      images: `[B, H, W, C]` uint8, or float, which receives a gradient.
      weights, layers: one per layer, as the forms of the plan.
      activation: follows every layer.
      dtype: of the computation; the parameters' gradients are summed in their own.
      plan: how to compute them; None: as `choose_plan` says.

    Returns:
      `[B, h, w, O]` of `dtype`.

    Raises:
      ValueError: if an image is smaller than a kernel.
    """
    chex.assert_rank([images, *(one.kernel for one in weights)], 4)
    chex.assert_equal(len(weights), len(layers))
    height, width = images.shape[1:3]
    for layer in layers:
        height, width = _output_side(height, layer), _output_side(width, layer)
        if min(height, width) < 1:
            raise ValueError(f"images of {images.shape[1:]} are too small for {layer}.")

    def apply_by(
        plan: Plan, images: jax.Array, weights: Sequence[LayerWeights]
    ) -> jax.Array:
        chex.assert_equal(len(plan.forms), len(layers))

        def apply_to_chunk(chunk: jax.Array) -> jax.Array:
            if jnp.issubdtype(chunk.dtype, jnp.floating):
                chunk = chunk.astype(dtype)
            for layer, layer_weights, form in zip(layers, weights, plan.forms):
                if layer.padding != "VALID":
                    rows, columns = map(layer.zeros, chunk.shape[1:3])
                    chunk = jnp.pad(chunk, ((0, 0), rows, columns, (0, 0)))
                # Cast here: in a loop over chunks the gradient is summed before the
                # cast.
                kernel = layer_weights.kernel.astype(dtype)
                chex.assert_equal(chunk.shape[3], kernel.shape[2])
                bias = layer_weights.bias.astype(dtype).reshape(1, 1, 1, -1)
                chunk = activation(form(chunk, kernel, stride=layer.stride) + bias)
            return chunk

        return _in_chunks(apply_to_chunk, images, plan.chunk_size)

    images = jnp.asarray(images)
    if plan is not None or not layers:
        return apply_by(plan or Plan((), None), images, weights)
    by_platform = {
        name: functools.partial(
            apply_by,
            choose_plan(name, images.shape[1:], layers),  # type: ignore[arg-type]
        )
        for name in ("cpu", "default")
    }
    return jax.lax.platform_dependent(images, weights, **by_platform)
