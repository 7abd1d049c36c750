"""What stands on the encoder of a value agent: dueling heads, noisy layers, atoms.

Noise is an argument, drawn by `draw_noise`: whoever calls decides when it is new, and
without it the layers have their mean weights. Letters: `...` leading dimensions, `H`
width of the encoding, `A` actions, `N` atoms, `p` inputs and `q` outputs of a layer.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aps_jax.networks import convolutions, modules
from aps_jax.types import Params, PRNGKey

DUELING = ("none", "last", "apart")

# Added to the range of an encoding that is divided by it.
_RANGE_EPSILON = 1e-5


class Noise(NamedTuple):
    """The noise of one layer: of weight (i, j) it is `inputs[i] * outputs[j]`."""

    inputs: jax.Array  # [p] float32
    outputs: jax.Array  # [q] float32, that of the biases too


def draw_noise(key: PRNGKey, params: Params) -> dict[str, Noise]:
    """Draws factorised noise `sign(e) sqrt|e|`, `e` normal, for a head's noisy layers.

    Fortunato et al. 2018, https://arxiv.org/abs/1706.10295.

    Args:
      key: Is consumed.
      params: Of a `ValueHead`.
    """
    shapes = {
        name: params[name]["kernel_sigma"].shape
        for name in sorted(params)
        if "kernel_sigma" in params[name]
    }
    # All at once, and cut: on CPUs each draw takes about as long as a layer.
    sizes = [size for shape in shapes.values() for size in shape]
    drawn = jax.random.normal(key, (sum(sizes),))
    factors = jnp.sign(drawn) * jnp.sqrt(jnp.abs(drawn))
    parts = iter(jnp.split(factors, np.cumsum(sizes[:-1], dtype=int)))
    return {name: Noise(next(parts), next(parts)) for name in shapes}


class NoisyDense(nn.Module):
    """A dense layer whose weights are a mean and a learned scale times noise.

        y = (mu + sigma * inputs outputs^T)^T x + mu_b + sigma_b * outputs

    Means begin uniform in +-1/sqrt(p), scales at `sigma / sqrt(p)`, and at `sigma /
    sqrt(q)` for biases (Rainbow's public PyTorch code). With `sigma` 0 there are none.
    """

    width: int
    sigma: float

    @nn.compact
    def __call__(self, x: jax.Array, noise: Noise | None) -> jax.Array:
        """Maps `[..., p]` to `[..., q]`."""
        p, q = x.shape[-1], self.width
        bound = 1.0 / math.sqrt(p)

        def mean(key: PRNGKey, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        kernel = self.param("kernel", mean, (p, q))
        bias = self.param("bias", mean, (q,))
        y = x @ kernel + _wide(bias, x)
        if not self.sigma:
            return y
        constant = nn.initializers.constant
        scale = self.param("kernel_sigma", constant(self.sigma * bound), (p, q))
        of_bias = constant(self.sigma / math.sqrt(q))
        bias_scale = self.param("bias_sigma", of_bias, (q,))
        if noise is None:
            return y
        # Noise of each weight, as the equation has it, would be computed in each
        # product and gradient again: on CPUs a second product takes less.
        noisy = (x * _wide(noise.inputs, x)) @ scale + _wide(bias_scale, x)
        return y + noisy * _wide(noise.outputs, x)


def _wide(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Gives a vector leading axes of size one, as many as `x` has."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


class ValueHead(nn.Module):
    """Gives every action a logit for each atom, after one hidden layer.

    Dueling heads add `V + A - mean_a A` (Wang et al. 2016,
    https://arxiv.org/abs/1511.06581), each of them from a hidden layer of its own
    (`apart`) or both from one (`last`). With one atom, the logit is the value.
    """

    num_actions: int
    atoms: int
    hidden: int
    dueling: str
    noisy_sigma: float

    def setup(self) -> None:
        layer = functools.partial(NoisyDense, sigma=self.noisy_sigma)
        self.hidden_0 = layer(self.hidden)
        self.advantage = layer(self.num_actions * self.atoms)
        if self.dueling != "none":
            self.value = layer(self.atoms)
        if self.dueling == "apart":
            self.hidden_1 = layer(self.hidden)

    def _hidden(
        self, encoded: jax.Array, noise: Mapping[str, Noise]
    ) -> list[jax.Array]:
        """Returns the hidden layers before their ReLU, the advantages' first."""
        found = [self.hidden_0(encoded, noise.get("hidden_0"))]
        if self.dueling == "apart":
            found.append(self.hidden_1(encoded, noise.get("hidden_1")))
        return found

    def project(self, encoded: jax.Array) -> jax.Array:
        """Maps `[..., H]` to the hidden layers without noise and ReLU, side by side."""
        return jnp.concatenate(self._hidden(encoded, {}), axis=-1)

    def __call__(self, encoded: jax.Array, noise: Mapping[str, Noise]) -> jax.Array:
        """Returns `[..., A, N]` logits of `[..., H]`."""
        hidden = [nn.relu(x) for x in self._hidden(encoded, noise)]
        logits = self.advantage(hidden[0], noise.get("advantage"))
        shape = (*logits.shape[:-1], self.num_actions, self.atoms)
        logits = logits.reshape(shape)
        if self.dueling == "none":
            return logits
        value = self.value(hidden[-1], noise.get("value"))
        return value[..., None, :] + logits - jnp.mean(logits, axis=-2, keepdims=True)


class DistributionalNetwork(nn.Module):
    """An encoder and a `ValueHead`.

    `is_renormalised` brings every encoding to the range [0, 1] (SPR). The gradient that
    the head sends into the encoder is multiplied by `gradient_scale`.
    """

    encoder: nn.Module
    head: ValueHead
    is_renormalised: bool = False
    gradient_scale: float = 1.0

    def encode(self, observation: jax.Array) -> jax.Array:
        """Maps an observation `[..., *observation_shape]` to `[..., H]`."""
        encoded = self.encoder(observation)
        return renormalize(encoded) if self.is_renormalised else encoded

    def values(self, encoded: jax.Array, noise: Mapping[str, Noise]) -> jax.Array:
        """Maps `[..., H]` to logits `[..., A, N]`."""
        if self.gradient_scale != 1.0:
            frozen = jax.lax.stop_gradient(encoded)
            encoded = frozen + self.gradient_scale * (encoded - frozen)
        return self.head(encoded, noise)

    def project(self, encoded: jax.Array) -> jax.Array:
        """Maps `[..., H]` to the head's hidden layers; see `ValueHead.project`."""
        return self.head.project(encoded)

    def __call__(self, observation: jax.Array, noise: Mapping[str, Noise]) -> jax.Array:
        """Maps observations to logits `[..., A, N]`."""
        return self.values(self.encode(observation), noise)


def renormalize(encoded: jax.Array) -> jax.Array:
    """Brings each encoding `[..., H]` to the range [0, 1] by its own extremes."""
    low = jnp.min(encoded, axis=-1, keepdims=True)
    high = jnp.max(encoded, axis=-1, keepdims=True)
    return (encoded - low) / (high - low + _RANGE_EPSILON)


class Transition(nn.Module):
    """Predicts the encoding after an action, by two 3x3 convolutions (SPR).

    Schwarzer et al. 2021, https://arxiv.org/abs/2007.05929. The encoding is seen as a
    square map of `channels`; the action is one plane of ones beside them.
    """

    num_actions: int
    channels: int
    is_batch_normalised: bool

    @nn.compact
    def __call__(self, encoded: jax.Array, action: jax.Array) -> jax.Array:
        """Maps `[B, H]` and `[B]` int to `[B, H]`."""
        batch, width = encoded.shape
        side = math.isqrt(width // self.channels)
        planes = jax.nn.one_hot(action, self.num_actions)[:, None, None, :]
        planes = jnp.broadcast_to(planes, (batch, side, side, self.num_actions))
        x = encoded.reshape(batch, side, side, self.channels)
        x = jnp.concatenate([x, planes], axis=-1)
        layer = convolutions.LayerShape(self.channels, 3, 1, padding="SAME")
        for index in range(2):
            channels = x.shape[-1]
            parameters = modules.ConvParameters(layer, channels, name=f"conv_{index}")
            x = convolutions.apply_layers(
                x,
                (parameters(),),
                layers=(layer,),
                activation=nn.relu,
                dtype=jnp.float32,
            )
            if self.is_batch_normalised and index == 0:
                x = jax.nn.standardize(x, axis=(0, 1, 2), epsilon=1e-5)
                shape = (1, 1, 1, self.channels)
                scale = self.param("norm_scale", nn.initializers.ones, shape)
                x = scale * x + self.param("norm_bias", nn.initializers.zeros, shape)
        return renormalize(x.reshape(batch, width))


class ContrastHead(nn.Module):
    """Maps encodings to what CURL compares: two layers, each normalised.

    Srinivas et al. 2020, https://arxiv.org/abs/2004.04136. The published Atari code
    draws both matrices uniformly from [0, 1) (`is_published`); else LeCun's are used.
    """

    hidden: int
    is_published: bool
    width: int = 128

    @nn.compact
    def __call__(self, encoded: jax.Array) -> jax.Array:
        """Maps `[..., H]` to `[..., width]`."""
        normalize = functools.partial(nn.LayerNorm, use_scale=False, use_bias=False)
        dense = functools.partial(
            nn.Dense, kernel_init=contrast_init(self.is_published)
        )
        hidden = nn.relu(normalize()(dense(self.hidden, name="hidden")(encoded)))
        return normalize()(dense(self.width, name="compared")(hidden))


def contrast_init(is_published: bool) -> nn.initializers.Initializer:
    """Returns how CURL's matrices begin."""
    if is_published:
        return nn.initializers.uniform(1.0)
    return nn.initializers.lecun_normal()
