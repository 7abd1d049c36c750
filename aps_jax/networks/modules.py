"""Encoders of observations, and the networks on top of them, as Flax modules.

An encoder is any module from an observation `[..., *observation_shape]` to a vector
`[..., H]`; the networks know nothing else of it, so images and planes are served alike.
Parameters are float32, whatever the compute dtype and the form of the convolutions.

Letters: `...` any number of leading dimensions (batch `B`, time `T`, environments
`E`), `H` width of the encoder's output, `K` tasks, `A` actions, `D` feature dimension.
"""

import functools
import math
from typing import ClassVar, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from aps_jax.networks import convolutions
from aps_jax.ops import sphere

# Standard deviation of the heads relative to LeCun's: |Q| starts well below the
# rewards, which are near 1, and no action is preferred by much at first.
_HEAD_SCALE = 0.1

_kernel_init = nn.initializers.he_normal()
_head_init = nn.initializers.variance_scaling(
    _HEAD_SCALE**2, "fan_in", "truncated_normal"
)


def _head(name: str, width: int) -> nn.Dense:
    """Makes the last layer of a network."""
    return nn.Dense(width, kernel_init=_head_init, name=name)


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


class _ConvEncoder(nn.Module):
    """Encodes images by convolutional layers and, if it has units, a hidden layer."""

    hidden: int | None = None
    dtype: jnp.dtype = jnp.float32  # Of the computation.
    plan: convolutions.Plan | None = None  # None: `convolutions.choose_plan` decides.
    activation: convolutions.Activation = nn.relu

    layers: ClassVar[tuple[convolutions.LayerShape, ...]] = ()
    highest: ClassVar[float] = 255.0  # of a pixel, which is scaled to [0, 1]

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          observation: `[..., H, W, C]` uint8, or float in the same units, 0 to 255
            (1 for planes); 84x84x4 in Atari.

        Returns:
          `[..., hidden]` float32, or `[..., h * w * O]` without a hidden layer.

        Raises:
          ValueError: if the observation is no image, or one too small for the layers.
        """
        if observation.ndim < 3:
            raise ValueError(f"images must be [..., H, W, C], got {observation.shape}.")
        if not jnp.issubdtype(observation.dtype, jnp.floating):
            chex.assert_type(observation, jnp.uint8)
        *leading, height, width, channels = observation.shape
        shape, layers = (height, width, channels), self.layers

        weights = []
        for index, layer in enumerate(layers):
            weights.append(ConvParameters(layer, channels, name=f"conv_{index}")())
            channels = layer.features
        for first in weights[:1]:
            # Scaling the few weights of the first layer scales its many pixels.
            weights[0] = first._replace(kernel=first.kernel * (1.0 / self.highest))

        encoded = convolutions.apply_layers(
            observation.reshape(math.prod(leading), *shape),
            weights,
            layers=layers,
            activation=self.activation,
            dtype=self.dtype,
            plan=self.plan,
        )
        encoded = encoded.reshape(*leading, math.prod(encoded.shape[1:]))
        if self.hidden is not None:
            dense = nn.Dense(
                self.hidden, dtype=self.dtype, kernel_init=_kernel_init, name="hidden"
            )
            encoded = nn.relu(dense(encoded))
        return encoded.astype(jnp.float32)


class NatureEncoder(_ConvEncoder):
    """Encodes images as DQN does: 32 8x8/4, 64 4x4/2, 64 3x3/1, then 512, all ReLU.

    Mnih et al. 2015, https://doi.org/10.1038/nature14236.
    """

    hidden: int | None = 512

    layers: ClassVar[tuple[convolutions.LayerShape, ...]] = (
        convolutions.LayerShape(32, 8, 4),
        convolutions.LayerShape(64, 4, 2),
        convolutions.LayerShape(64, 3, 1),
    )


class NatureSameEncoder(NatureEncoder):
    """The same with SAME padding, as in Dopamine's agents: 11x11x64 in place of 7x7x64.

    Castro et al. 2018, https://arxiv.org/abs/1812.06110.
    """

    layers: ClassVar = tuple(
        layer._replace(padding="SAME") for layer in NatureEncoder.layers
    )


class PaperEncoder(_ConvEncoder):
    """Encodes images as APS does: four 3x3 layers of 32 ELUs, strides 2-1-1-1, flat.

    The linear layer after it is the network's own (APS, appendix, after DrQ's
    continuous-control encoder), https://arxiv.org/abs/2108.13956.
    """

    activation: convolutions.Activation = convolutions.elu

    layers: ClassVar = (
        convolutions.LayerShape(32, 3, 2),
        *[convolutions.LayerShape(32, 3, 1)] * 3,
    )


class SmallEncoder(_ConvEncoder):
    """Encodes images cheaply: 32 and 64 ReLUs of 5x5/5, then a hidden layer.

    The encoder of data-efficient Rainbow (van Hasselt et al. 2019,
    https://arxiv.org/abs/1906.05243), except that zeros are padded to whole windows
    (84 to 85, 17 to 20) where that one crops: cropping sees 75 of the 84 rows, and
    Breakout's paddle is at row 76.
    """

    hidden: int | None = 256

    layers: ClassVar = (
        convolutions.LayerShape(32, 5, 5, padding="WHOLE"),
        convolutions.LayerShape(64, 5, 5, padding="WHOLE"),
    )


class SmallValidEncoder(_ConvEncoder):
    """Encodes images as data-efficient Rainbow did: it sees 75 of the 84 rows, flat."""

    layers: ClassVar = (
        convolutions.LayerShape(32, 5, 5),
        convolutions.LayerShape(64, 5, 5),
    )


class MinAtarEncoder(_ConvEncoder):
    """Encodes planes of 0 and 1: 16 ReLUs of 3x3/1, then a hidden layer of 128.

    The encoder of MinAtar's own DQN (Young and Tian 2019,
    https://arxiv.org/abs/1903.03176).
    """

    hidden: int | None = 128

    layers: ClassVar = (convolutions.LayerShape(16, 3, 1),)
    highest: ClassVar[float] = 1.0


class MlpEncoder(_ConvEncoder):
    """Encodes planes of 0 and 1, such as one-hot states, by a ReLU layer alone."""

    hidden: int | None = 256

    highest: ClassVar[float] = 1.0


class FeatureNetwork(nn.Module):
    """Maps an observation to its features h and phi (APS, section 4.2).

    phi is a point of the unit sphere; at h = 0 both phi and its gradient are finite.
    """

    encoder: nn.Module
    feature_dim: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> Features:
        """Returns the features of an observation `[..., *observation_shape]`."""
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

        dense = functools.partial(nn.Dense, self.hidden, kernel_init=_kernel_init)
        from_state = dense(name="from_state")(encoded)
        from_task = dense(use_bias=False, name="from_task")(tasks)
        hidden = nn.relu(from_state[..., None, :] + from_task)  # [..., K, hidden]
        psi = _head("psi", self.num_actions * self.feature_dim)(hidden)
        psi = psi.reshape(*psi.shape[:-1], self.num_actions, self.feature_dim)
        if not self.exploration_head:
            return Successor(psi=psi, exploration=None)
        exploration = _head("exploration", self.num_actions)(hidden)
        return Successor(psi=psi, exploration=exploration)


class ValueNetwork(nn.Module):
    """Values the actions of a state, after one hidden layer."""

    encoder: nn.Module
    num_actions: int
    hidden: int = 512

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Returns `[..., A]` values of an observation `[..., *observation_shape]`."""
        dense = nn.Dense(self.hidden, kernel_init=_kernel_init, name="from_state")
        hidden = nn.relu(dense(self.encoder(observation)))
        return _head("values", self.num_actions)(hidden)
