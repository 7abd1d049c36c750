"""Tests of aps_jax.networks.value_heads: noise, dueling, encodings, transitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax.agents import base
from aps_jax.networks import value_heads

P, Q = 6, 5


def test_noise_has_the_variance_that_its_scales_say():
    layer = value_heads.NoisyDense(Q, sigma=0.5)
    x = np.float32([[1.0, -2.0, 0.0, 3.0, 0.5, 1.0]])
    params = layer.init(jax.random.key(0), x, None)
    weights = params["params"]
    np.testing.assert_allclose(weights["kernel_sigma"], 0.5 / np.sqrt(P), rtol=1e-6)
    np.testing.assert_allclose(weights["bias_sigma"], 0.5 / np.sqrt(Q), rtol=1e-6)
    assert np.max(np.abs(weights["kernel"])) <= 1 / np.sqrt(P)

    @jax.jit
    def outputs(keys):
        def one(key):
            noise = value_heads.draw_noise(key, {"layer": weights})
            return layer.apply(params, x, noise["layer"])[0]

        return jax.vmap(one)(keys)

    drawn = np.float64(outputs(jax.random.split(jax.random.key(1), 40_000)))
    mean = np.float64(x[0]) @ weights["kernel"] + weights["bias"]
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.02)
    absolute = np.sqrt(2 / np.pi)  # E |e|
    s, s_bias = 0.5 / np.sqrt(P), 0.5 / np.sqrt(Q)
    variance = absolute * (absolute * s**2 * np.sum(x**2) + s_bias**2)
    np.testing.assert_allclose(drawn.var(axis=0), variance, rtol=0.05)
    # Without noise, the mean weights exactly.
    np.testing.assert_array_equal(
        layer.apply(params, x, None),
        x @ weights["kernel"] + np.asarray(weights["bias"])[None],
    )


def test_factors_and_layers_have_noise_of_their_own():
    layer = {"kernel_sigma": jnp.zeros((3000, 3000))}
    params = {"hidden_0": layer, "hidden_1": layer, "value": layer, "plain": {}}
    noise = value_heads.draw_noise(jax.random.key(0), params)
    assert set(noise) == {"hidden_0", "hidden_1", "value"}
    factors = np.stack([x for each in noise.values() for x in each])
    np.testing.assert_allclose(np.corrcoef(factors), np.eye(6), atol=0.08)
    # f(e) = sign(e) sqrt|e|: E f^2 = E|e|.
    np.testing.assert_allclose(np.mean(factors**2), np.sqrt(2 / np.pi), atol=0.02)
    again = value_heads.draw_noise(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, noise, again)


def make_head(dueling, noisy_sigma=0.5):
    head = value_heads.ValueHead(3, 4, 7, dueling, noisy_sigma)
    x = np.random.default_rng(0).normal(size=(2, P)).astype(np.float32)
    return head, jax.jit(head.init)(jax.random.key(0), x, {}), x


@pytest.mark.parametrize("dueling", value_heads.DUELING)
def test_heads_are_what_they_are_written_slowly(dueling):
    head, params, x = make_head(dueling)
    weights = jax.tree.map(np.float64, params["params"])

    def layer(name, x):
        return x @ weights[name]["kernel"] + weights[name]["bias"]

    hidden = [layer("hidden_0", np.float64(x))]
    if dueling == "apart":
        hidden.append(layer("hidden_1", np.float64(x)))
    expected = layer("advantage", np.maximum(hidden[0], 0)).reshape(2, 3, 4)
    if dueling != "none":
        value = layer("value", np.maximum(hidden[-1], 0))
        expected = value[:, None] + expected - expected.mean(axis=1, keepdims=True)
        # The mean over actions is V's.
        np.testing.assert_allclose(expected.mean(axis=1), value, atol=1e-12)
    logits = jax.jit(head.apply)(params, x, {})
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    projected = head.apply(params, x, method="project")
    np.testing.assert_allclose(projected, np.concatenate(hidden, 1), atol=1e-5)
    noise = value_heads.draw_noise(jax.random.key(1), params["params"])
    assert set(noise) == set(weights)
    assert np.max(np.abs(head.apply(params, x, noise) - logits)) > 0.05
    # What all advantages share does not count.
    if dueling != "none":
        bias = weights["advantage"]["bias"] + np.tile([1.0, 2.0, 3.0, 4.0], 3)
        params["params"]["advantage"]["bias"] = np.float32(bias)
        np.testing.assert_allclose(head.apply(params, x, {}), expected, atol=1e-5)


def test_the_head_sends_a_part_of_its_gradient_into_the_encoder():
    _, params, x = make_head("last", 0.0)
    grads = {}
    for scale in (1.0, 0.5):
        network = value_heads.DistributionalNetwork(
            nn.Dense(P),
            value_heads.ValueHead(3, 4, 7, "last", 0.0),
            gradient_scale=scale,
        )
        params = network.init(jax.random.key(0), x, {})
        grads[scale] = jax.grad(
            lambda p, net=network: jnp.sum(net.apply(p, x, {})[..., 0] ** 2)
        )(params)["params"]
    jax.tree.map(
        lambda half, whole: np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-5),
        grads[0.5]["encoder"],
        grads[1.0]["encoder"],
    )
    jax.tree.map(np.testing.assert_array_equal, grads[0.5]["head"], grads[1.0]["head"])


def test_encodings_are_brought_to_the_unit_range_one_by_one():
    x = np.float32([[1.0, 3.0, 2.0], [0.0, 30.0, 60.0], [7.0, 7.0, 7.0]])
    result = value_heads.renormalize(x)
    np.testing.assert_allclose(result, [[0, 1, 0.5], [0, 0.5, 1], [0, 0, 0]], atol=1e-5)


@pytest.mark.parametrize("is_batch_normalised", [True, False])
def test_a_transition_is_two_convolutions_of_the_map_and_the_action(
    is_batch_normalised,
):
    side, channels, batch = 3, 4, 5
    module = value_heads.Transition(2, channels, is_batch_normalised)
    rng = np.random.default_rng(0)
    encoded = rng.normal(size=(batch, side * side * channels)).astype(np.float32)
    action = np.int32([0, 1, 0, 1, 1])
    params = module.init(jax.random.key(0), encoded, action)
    x = encoded.reshape(batch, side, side, channels)
    planes = np.eye(2, dtype=np.float32)[action][:, None, None, :]
    x = np.concatenate([x, np.broadcast_to(planes, (batch, side, side, 2))], axis=-1)
    for index in range(2):
        conv = nn.Conv(channels, (3, 3), padding="SAME")
        x = conv.apply({"params": params["params"][f"conv_{index}"]}, x)
        x = np.maximum(np.float64(x), 0.0)
        if is_batch_normalised and index == 0:
            mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
            x = np.float32((x - mean) / np.sqrt(variance + 1e-5))
        x = np.float32(x)
    expected = x.reshape(batch, -1)
    low, high = expected.min(1, keepdims=True), expected.max(1, keepdims=True)
    result = jax.jit(module.apply)(params, encoded, action)
    np.testing.assert_allclose(result, (expected - low) / (high - low), atol=2e-4)


@pytest.mark.parametrize(
    "name, width", [("small_valid", 576), ("nature_same", 7744), ("nature", 3136)]
)
def test_published_encoders_have_their_sizes(name, width):
    encoder = base.ENCODERS[name]().clone(hidden=None)
    images = jax.ShapeDtypeStruct((2, 84, 84, 4), np.uint8)
    encoded, _ = jax.eval_shape(encoder.init_with_output, jax.random.key(0), images)
    assert encoded.shape == (2, width)


def test_the_encoder_of_der_crops_the_row_of_breakouts_paddle():
    encoder = base.ENCODERS["small_valid"]()
    images = np.zeros((1, 84, 84, 4), np.float32)
    params = jax.jit(encoder.init)(jax.random.key(0), images)
    # With these biases no ReLU is off.
    params = jax.tree.map(lambda x: x + 1.0 if x.ndim == 1 else x, params)
    grads = jax.jit(jax.grad(lambda x: jnp.sum(encoder.apply(params, x))))(images)
    rows = np.flatnonzero(np.any(np.asarray(grads)[0] != 0, axis=(1, 2)))
    assert rows.tolist() == list(range(75))
