"""What a value agent learns about its encodings besides values: nothing, CURL or SPR.

Letters: `B` windows, `T` states of a window, `K` jumps, `H` width of an encoding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aps_jax.networks import value_heads
from aps_jax.ops import augment
from aps_jax.replay.buffer import Window
from aps_jax.types import Array, Params, PRNGKey

# CURL's cosine-like products are multiplied by this (temperature 10).
_CURL_SCALE = 0.1
_CURL_PAD = 4
# Least norm of a vector whose angle is compared.
_LEAST_NORM = 1e-5


class Inputs(NamedTuple):
    """What an auxiliary loss sees of an update."""

    values: Params  # of the value network
    target_values: Params  # its slow copy
    own: Params  # of the auxiliary networks
    slow: Any  # moving averages; see `Auxiliary.follow`
    windows: Window  # [B, T, ...]
    encoded: jax.Array  # [B, H], of the windows' first states as the values saw them


class Auxiliary(NamedTuple):
    """An auxiliary loss bound to a config."""

    # key, parameters of the value network, encoding [1, H] -> its own parameters
    init: Callable[[PRNGKey, jax.Array], Params]
    # values, own -> moving averages of them at the start
    start: Callable[[Params, Params], Any]
    # moving averages, values, own -> moving averages after an update
    follow: Callable[[Any, Params, Params], Any]
    loss: Callable[[Inputs, PRNGKey], jax.Array]  # inputs, key (consumed) -> [B]


def none() -> Auxiliary:
    """Returns the loss that is 0."""
    return Auxiliary(
        init=lambda key, encoded: {},
        start=lambda values, own: {},
        follow=lambda slow, values, own: {},
        loss=lambda inputs, key: jnp.zeros(inputs.encoded.shape[0]),
    )


def contrast_losses(query: Array, key: Array, bilinear: Array) -> jax.Array:
    """Returns how badly each query finds its own key among those of the batch.

    Cross-entropy of `0.1 q_i^T W k_j` over `j` (the temperature of CURL's Atari code).

    Args:
      query: `[B, D]` float.
      key: `[B, D]` float.
      bilinear: `[D, D]` float, W.

    Returns:
      `[B]` float.
    """
    logits = _CURL_SCALE * (query @ bilinear @ key.T)
    labels = jnp.arange(query.shape[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def prediction_loss(predicted: Array, reached: Array, is_end: Array) -> jax.Array:
    """Compares the directions of predictions with what was reached, of one window.

    The mean over jumps of `|y / |y| - t / |t||^2 = 2 - 2 cos` (SPR). From the
    first end of a game on they count as 0.

    Args:
      predicted: `[K, D]` float, y.
      reached: `[K, D]` float, t, a constant.
      is_end: `[K]` bool, whether an episode or a life ends or begins at that state.

    Returns:
      `[]` float.
    """
    distances = 2.0 * optax.cosine_distance(
        predicted, jax.lax.stop_gradient(reached), epsilon=_LEAST_NORM
    )
    is_same_game = jnp.cumsum(is_end) == 0
    return jnp.mean(jnp.where(is_same_game, distances, 0.0))


def curl(
    network: value_heads.DistributionalNetwork,
    *,
    hidden: int,
    tau: float,
    is_published: bool,
) -> Auxiliary:
    """Makes CURL: two views of a state are alike, and differ from those of others.

    Srinivas et al. 2020, https://arxiv.org/abs/2004.04136. The keys are those of a
    moving average of the encoder and the head.

    Args:
      network: The value network.
      hidden: Units of the head's hidden layer.
      tau: Rate of the moving average.
      is_published: Whether matrices begin as in the published code, and every state
        gets the mean loss of the batch.
    """
    head: Any = value_heads.ContrastHead(hidden, is_published)

    def compared(values: Params, own: Params, images: jax.Array) -> jax.Array:
        encoded: Any = network.apply(values, images, method="encode")
        return head.apply(own["head"], encoded)

    def init(key: PRNGKey, encoded: jax.Array) -> Params:
        head_key, bilinear_key = jax.random.split(key)
        shape = (head.width, head.width)
        return {
            "head": head.init(head_key, encoded),
            "bilinear": value_heads.contrast_init(is_published)(bilinear_key, shape),
        }

    def moving(values: Params, own: Params) -> Any:
        encoder = {"params": {"encoder": values["params"]["encoder"]}}
        return {"values": encoder, "own": {"head": own["head"]}}

    def loss(inputs: Inputs, key: PRNGKey) -> jax.Array:
        images = inputs.windows.observation[:, 0]
        view = functools.partial(augment.crop_pad_crop, pad=_CURL_PAD)
        views = jax.vmap(lambda keys: jax.vmap(view)(keys, images))(
            jax.random.split(key, (2, images.shape[0]))
        )
        query = compared(inputs.values, inputs.own, views[0])
        keys = compared(inputs.slow["values"], inputs.slow["own"], views[1])
        losses = contrast_losses(
            query, jax.lax.stop_gradient(keys), inputs.own["bilinear"]
        )
        if is_published:
            losses = jnp.broadcast_to(jnp.mean(losses), losses.shape)
        return losses

    return Auxiliary(
        init=init,
        # Copies: donated buffers must not be aliased.
        start=lambda values, own: jax.tree.map(jnp.copy, moving(values, own)),
        follow=lambda slow, values, own: optax.incremental_update(
            moving(values, own), slow, tau
        ),
        loss=loss,
    )


def spr(
    network: value_heads.DistributionalNetwork,
    *,
    num_actions: int,
    channels: int,
    jumps: int,
    is_batch_normalised: bool,
    change: Callable[[PRNGKey, jax.Array], jax.Array],
    cut_at_life_loss: bool,
) -> Auxiliary:
    """Makes SPR: from an encoding and actions follow the encodings of the next states.

    Schwarzer et al. 2021, https://arxiv.org/abs/2007.05929. What is compared are the
    hidden layers of the value head; the targets are those of the slow copy.

    Args:
      network: The value network.
      num_actions: Actions of the game.
      channels: Of the encoder's last layer.
      jumps: `K`.
      is_batch_normalised: Whether the transition has batch normalisation.
      change: Augments images `[N, ...]`.
      cut_at_life_loss: Whether a lost life ends what can be predicted.
    """
    transition: Any = value_heads.Transition(num_actions, channels, is_batch_normalised)

    def init(key: PRNGKey, encoded: jax.Array) -> Params:
        transition_key, predictor_key = jax.random.split(key)
        width = network.head.hidden * (2 if network.head.dueling == "apart" else 1)
        action = jnp.zeros((1,), jnp.int32)
        return {
            "transition": transition.init(transition_key, encoded, action),
            "predictor": {
                "kernel": jax.nn.initializers.lecun_normal()(
                    predictor_key, (width, width)
                ),
                "bias": jnp.zeros((1, width)),
            },
        }

    def loss(inputs: Inputs, key: PRNGKey) -> jax.Array:
        windows, own = inputs.windows, inputs.own
        encoded, projected = inputs.encoded, []
        for jump in range(jumps):
            encoded = transition.apply(
                own["transition"], encoded, windows.action[:, jump]
            )
            projected.append(network.apply(inputs.values, encoded, method="project"))
        predictor = own["predictor"]
        predicted = [x @ predictor["kernel"] + predictor["bias"] for x in projected]

        images = windows.observation[:, 1 : jumps + 1]
        images = change(key, images.reshape(-1, *images.shape[2:]))
        reached: Any = network.apply(inputs.target_values, images, method="encode")
        reached = network.apply(inputs.target_values, reached, method="project")
        reached = reached.reshape(-1, jumps, reached.shape[-1])

        is_end = windows.terminated | windows.is_first
        if cut_at_life_loss:
            is_end |= windows.life_lost
        return jax.vmap(prediction_loss)(
            jnp.stack(predicted, axis=1), reached, is_end[:, 1 : jumps + 1]
        )

    return Auxiliary(
        init=init,
        start=lambda values, own: {},
        follow=lambda slow, values, own: {},
        loss=loss,
    )
