"""Encoders, the feature network and the successor-feature network, as Flax modules.

An encoder is any module from an observation `[..., *observation_shape]` to a vector
`[..., H]`; the networks know nothing else of it, so images and one-hot states are
served alike. Parameters are float32, whatever the compute dtype and the form of the
convolutions.

Letters: `...` any number of leading dimensions (batch `B`, time `T`, environments
`E`), `H` width of the encoder's output, `K` tasks, `A` actions, `D` feature dimension.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax.networks import convolutions
from aps_jax.ops import sphere

_PIXEL_RANGE = 255.0  # The largest uint8; images are scaled to [0, 1].
# Standard deviation of the heads relative to LeCun's: |Q| starts well below the
# rewards, which are near 1, and no action is preferred by much at first.
_HEAD_SCALE = 0.1

_kernel_init = nn.initializers.he_normal()
_head_init = nn.initializers.variance_scaling(
    _HEAD_SCALE**2, "fan_in", "truncated_normal"
)


class Features(NamedTuple):
    """What the feature network says about one state."""

    h: jax.Array  # [..., D] not normalised: the space of the particle entropy.
    phi: jax.Array  # [..., D] h scaled to the unit sphere.


class Successor(NamedTuple):
    """What the successor network predicts for one state under each task."""

    psi: jax.Array  # [..., K, A, D] successor features.
    exploration: jax.Array | None  # [..., K, A] value of the entropy reward, or None.


class ConvParameters(nn.Module):
    """Holds the parameters of one convolutional layer, under the names of `nn.Conv`."""

    shape: convolutions.LayerShape
    channels: int

    @nn.compact
    def __call__(self) -> convolutions.LayerWeights:
        features, side = self.shape.features, self.shape.side
        kernel_shape = (side, side, self.channels, features)
        return convolutions.LayerWeights(
            kernel=self.param("kernel", _kernel_init, kernel_shape),
            bias=self.param("bias", nn.initializers.zeros, (features,)),
        )


def _convolve_and_flatten(
    observation: jax.Array,
    layers: Sequence[convolutions.LayerShape],
    *,
    activation: convolutions.Activation,
    dtype: jnp.dtype,
    plan: convolutions.Plan | None,
) -> jax.Array:
    """Passes images through layers `conv_0`, `conv_1`, ... of the calling module.

    Args:
      observation: `[..., H, W, C]` uint8, or float in the same units, 0 to 255.
      layers: from the image on.
      activation: follows every layer.
      dtype: of the computation.
      plan: None leaves the choice to `convolutions.choose_plan`.

    Returns:
      `[..., h * w * O]` of `dtype`.

    Raises:
      ValueError: if the observation is no image, or one too small for the layers.
    """
    if observation.ndim < 3:
        raise ValueError(f"images must be [..., H, W, C], got {observation.shape}.")
    if not jnp.issubdtype(observation.dtype, jnp.floating):
        chex.assert_type(observation, jnp.uint8)
    leading, image_shape = observation.shape[:-3], observation.shape[-3:]
    if plan is None:
        backend = jax.default_backend()
        plan = convolutions.choose_plan(backend, image_shape, layers)

    weights = []
    channels = image_shape[-1]
    for index, layer in enumerate(layers):
        weights.append(ConvParameters(layer, channels, name=f"conv_{index}")())
        channels = layer.features
    # Scaling the few weights of the first layer scales its many pixels.
    first = weights[0]
    weights[0] = first._replace(kernel=first.kernel * (1.0 / _PIXEL_RANGE))

    images = observation.reshape(math.prod(leading), *image_shape)
    images = convolutions.apply_layers(
        images, weights, layers=layers, activation=activation, dtype=dtype, plan=plan
    )
    return images.reshape(*leading, math.prod(images.shape[1:]))


class NatureEncoder(nn.Module):
    """Encodes images as DQN does: 32 8x8/4, 64 4x4/2, 64 3x3/1, then 512, all ReLU.

    Mnih et al. 2015, https://doi.org/10.1038/nature14236.
    """

    hidden: int = 512
    dtype: jnp.dtype = jnp.float32
    plan: convolutions.Plan | None = None

    layers: ClassVar = (
        convolutions.LayerShape(32, 8, 4),
        convolutions.LayerShape(64, 4, 2),
        convolutions.LayerShape(64, 3, 1),
    )

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Maps `[..., 84, 84, 4]` uint8 (or float from 0 to 255) to `[..., hidden]`."""
        flat = _convolve_and_flatten(
            observation,
            self.layers,
            activation=convolutions.relu,
            dtype=self.dtype,
            plan=self.plan,
        )
        dense = nn.Dense(
            self.hidden, dtype=self.dtype, kernel_init=_kernel_init, name="hidden"
        )
        return nn.relu(dense(flat)).astype(jnp.float32)


class PaperEncoder(nn.Module):
    """Encodes images as APS does: four 3x3 layers of 32 ELUs, strides 2-1-1-1, flat.

    The linear layer after it is the network's own (APS, appendix, after DrQ's
    continuous-control encoder), https://arxiv.org/abs/2108.13956.
    """

    dtype: jnp.dtype = jnp.float32
    plan: convolutions.Plan | None = None

    layers: ClassVar = (
        convolutions.LayerShape(32, 3, 2),
        convolutions.LayerShape(32, 3, 1),
        convolutions.LayerShape(32, 3, 1),
        convolutions.LayerShape(32, 3, 1),
    )

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Maps `[..., 84, 84, 4]` uint8 (or float from 0 to 255) to `[..., 39200]`."""
        flat = _convolve_and_flatten(
            observation,
            self.layers,
            activation=convolutions.elu,
            dtype=self.dtype,
            plan=self.plan,
        )
        return flat.astype(jnp.float32)


class SmallEncoder(nn.Module):
    """Encodes images cheaply: 32 and 64 ReLUs of 5x5/5, then a hidden layer.

    The encoder of data-efficient Rainbow (van Hasselt et al. 2019,
    https://arxiv.org/abs/1906.05243), except that zeros are padded to whole windows
    (84 to 85, 17 to 20) where that one crops: cropping sees 75 of the 84 rows, and
    Breakout's paddle is at row 76.
    """

    hidden: int = 256
    dtype: jnp.dtype = jnp.float32
    plan: convolutions.Plan | None = None

    layers: ClassVar = (
        convolutions.LayerShape(32, 5, 5, is_padded=True),
        convolutions.LayerShape(64, 5, 5, is_padded=True),
    )

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Maps `[..., 84, 84, 4]` uint8 (or float from 0 to 255) to `[..., hidden]`."""
        flat = _convolve_and_flatten(
            observation,
            self.layers,
            activation=convolutions.relu,
            dtype=self.dtype,
            plan=self.plan,
        )
        dense = nn.Dense(
            self.hidden, dtype=self.dtype, kernel_init=_kernel_init, name="hidden"
        )
        return nn.relu(dense(flat)).astype(jnp.float32)


class MlpEncoder(nn.Module):
    """Encodes vectors, such as the maze's one-hot states, by ReLU layers."""

    hidden: Sequence[int] = (256,)

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Maps `[..., X]` float to `[..., hidden[-1]]`."""
        for index, width in enumerate(self.hidden):
            dense = nn.Dense(width, kernel_init=_kernel_init, name=f"hidden_{index}")
            observation = nn.relu(dense(observation))
        return observation


class FeatureNetwork(nn.Module):
    """Maps an observation to its features h and phi (APS, section 4.2).

    phi is a point of the unit sphere; at h = 0 both phi and its gradient are finite.
    """

    encoder: nn.Module
    feature_dim: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> Features:
        """Returns `Features` of an observation `[..., *observation_shape]`."""
        encoded = self.encoder(observation)
        h = nn.Dense(self.feature_dim, name="h")(encoded)
        return Features(h=h, phi=sphere.normalize(h))


class SuccessorNetwork(nn.Module):
    """Predicts psi(s, a, w) for K tasks w at once, after one pass of the encoder.

    The hidden layer sees state and task as one concatenated input would, its product
    with the state computed once for all tasks:

        psi = W relu(W_s encoder(s) + W_w w + b).

    Universal successor features, https://arxiv.org/abs/1906.05030.
    """

    encoder: nn.Module
    num_actions: int
    feature_dim: int
    hidden: int = 512
    exploration_head: bool = False

    @nn.compact
    def __call__(self, observation: jax.Array, tasks: jax.Array) -> Successor:
        """Predicts for each task.

        Args:
          observation: `[..., *observation_shape]`, whatever the encoder takes.
          tasks: `[..., K, D]` float with the same leading dimensions.

        Returns:
          `Successor`, with `exploration` None unless `exploration_head`.
        """
        encoded = self.encoder(observation)  # [..., H]
        chex.assert_type(tasks, float)
        chex.assert_shape(tasks, (*encoded.shape[:-1], None, self.feature_dim))

        from_state = nn.Dense(self.hidden, kernel_init=_kernel_init, name="from_state")(
            encoded
        )
        from_task = nn.Dense(
            self.hidden, use_bias=False, kernel_init=_kernel_init, name="from_task"
        )(tasks)
        hidden = nn.relu(from_state[..., None, :] + from_task)  # [..., K, hidden]
        psi = nn.Dense(
            self.num_actions * self.feature_dim, kernel_init=_head_init, name="psi"
        )(hidden)
        psi = psi.reshape(*psi.shape[:-1], self.num_actions, self.feature_dim)
        if not self.exploration_head:
            return Successor(psi=psi, exploration=None)
        exploration = nn.Dense(
            self.num_actions, kernel_init=_head_init, name="exploration"
        )(hidden)
        return Successor(psi=psi, exploration=exploration)


class ValueNetwork(nn.Module):
    """Values the actions of a state, after one hidden layer."""

    encoder: nn.Module
    num_actions: int
    hidden: int = 512

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Returns `[..., A]` values of an observation `[..., *observation_shape]`."""
        hidden = nn.Dense(self.hidden, kernel_init=_kernel_init, name="from_state")(
            self.encoder(observation)
        )
        return nn.Dense(self.num_actions, kernel_init=_head_init, name="values")(
            nn.relu(hidden)
        )
