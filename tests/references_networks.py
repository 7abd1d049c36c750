"""Slow float64 NumPy twins of the convolutions and the networks."""

import numpy as np


def convolve(images, kernel, stride):
    """Correlates `[B, H, W, C]` with `[P, Q, C, O]`, one output pixel at a time."""
    images, kernel = np.float64(images), np.float64(kernel)
    rows, columns, _, features = kernel.shape
    batch, height, width, _ = images.shape
    out = np.zeros(
        (
            batch,
            (height - rows) // stride + 1,
            (width - columns) // stride + 1,
            features,
        )
    )
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            top, left = stride * i, stride * j
            window = images[:, top : top + rows, left : left + columns]
            out[:, i, j] = np.tensordot(window, kernel, axes=3)
    return out


def convolve_gradients(images, kernel, stride, cotangent):
    """Returns the gradients of `sum(cotangent * convolve)` by images and kernel."""
    images, kernel = np.float64(images), np.float64(kernel)
    cotangent = np.float64(cotangent)
    rows, columns, _, _ = kernel.shape
    images_grad, kernel_grad = np.zeros_like(images), np.zeros_like(kernel)
    for i in range(cotangent.shape[1]):
        for j in range(cotangent.shape[2]):
            here = (
                slice(None),
                slice(stride * i, stride * i + rows),
                slice(stride * j, stride * j + columns),
            )
            pulled = cotangent[:, i, j]  # [B, O]
            images_grad[here] += np.einsum("bo,uvco->buvc", pulled, kernel)
            kernel_grad += np.einsum("buvc,bo->uvco", images[here], pulled)
    return images_grad, kernel_grad


def relu(x):
    return np.maximum(x, 0.0)


def elu(x):
    return np.where(x > 0.0, x, np.expm1(np.minimum(x, 0.0)))


def pad_to_strides(images, stride):
    """Appends black rows and columns up to the next multiple of the stride."""
    _, height, width, _ = images.shape
    rows, columns = -height % stride, -width % stride
    return np.pad(images, ((0, 0), (0, rows), (0, columns), (0, 0)))


def dense(x, params):
    y = x @ np.float64(params["kernel"])
    return y + np.float64(params["bias"]) if "bias" in params else y


def nature(params, images):
    """`[B, H, W, C]` bytes to `[B, hidden]`."""
    x = images / 255.0
    for name, stride in (("conv_0", 4), ("conv_1", 2), ("conv_2", 1)):
        x = relu(convolve(x, params[name]["kernel"], stride) + params[name]["bias"])
    return relu(dense(x.reshape(len(x), -1), params["hidden"]))


def paper(params, images):
    """`[B, H, W, C]` bytes to `[B, h * w * 32]`."""
    x = images / 255.0
    for name, stride in (("conv_0", 2), ("conv_1", 1), ("conv_2", 1), ("conv_3", 1)):
        x = elu(convolve(x, params[name]["kernel"], stride) + params[name]["bias"])
    return x.reshape(len(x), -1)


def small(params, images):
    """`[B, H, W, C]` bytes to `[B, hidden]`."""
    x = images / 255.0
    for name in ("conv_0", "conv_1"):
        x = pad_to_strides(x, 5)
        x = relu(convolve(x, params[name]["kernel"], 5) + params[name]["bias"])
    return relu(dense(x.reshape(len(x), -1), params["hidden"]))


def successor(params, encoded, task, num_actions):
    """One encoded state `[H]` and one task `[D]` to psi `[A, D]` and values `[A]`."""
    hidden = relu(
        dense(encoded, params["from_state"]) + dense(task, params["from_task"])
    )
    psi = dense(hidden, params["psi"]).reshape(num_actions, len(task))
    return psi, dense(hidden, params["exploration"])
