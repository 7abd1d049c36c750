"""Tests for the forms of a convolution and the choice among them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_networks

from aps_jax.networks import convolutions

# Batch, height, width, channels in, kernel height and width, channels out, stride.
CASES = (
    (1, 1, 1, 1, 1, 1, 1, 1),
    (3, 7, 6, 2, 3, 3, 4, 1),  # Overlapping windows.
    (2, 5, 8, 3, 2, 4, 5, 1),  # A kernel that is not square.
    (3, 9, 11, 2, 3, 3, 4, 2),  # A side that is no multiple of the stride.
    (2, 20, 22, 4, 8, 8, 3, 4),  # DQN's first layer, two columns never seen.
    (5, 10, 12, 3, 5, 5, 4, 5),  # Disjoint windows, two columns never seen.
    (2, 8, 8, 1, 2, 2, 3, 3),  # Pixels between the windows.
)
FORMS = {
    "xla": convolutions.convolve_xla,
    "windows": convolutions.convolve_windows,
    "forward_only": convolutions.convolve_forward_only,
}
FORM_CASES = [
    pytest.param(form, case, jax.jit, id=f"{name}-{case}")
    for name, form in FORMS.items()
    for case in CASES
    if name != "forward_only" or case[-1] == 1
] + [
    pytest.param(form, CASES[1], lambda f: f, id=f"{name}-eager")
    for name, form in FORMS.items()
]


def make_operands(case, seed=0):
    batch, height, width, channels, rows, columns, features, stride = case
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, height, width, channels)).astype(np.float32)
    kernel = rng.normal(size=(rows, columns, channels, features)).astype(np.float32)
    return images, kernel, stride


@pytest.mark.parametrize("form, case, transform", FORM_CASES)
def test_value_and_gradients_match_the_reference(form, case, transform):
    images, kernel, stride = make_operands(case)
    expected = references_networks.convolve(images, kernel, stride)
    cotangent = np.random.default_rng(1).normal(size=expected.shape)
    cotangent = cotangent.astype(np.float32)

    @transform
    def value_and_gradients(images, kernel, cotangent):
        value, pull_back = jax.vjp(
            functools.partial(form, stride=stride), images, kernel
        )
        return value, *pull_back(cotangent)

    value, images_grad, kernel_grad = value_and_gradients(images, kernel, cotangent)

    references = references_networks.convolve_gradients(
        images, kernel, stride, cotangent
    )
    assert value.dtype == images_grad.dtype == kernel_grad.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(images_grad, references[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(kernel_grad, references[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_hand_computed(name):
    # 1 2 3   the kernel 1 10    1 + 20 + 400 + 5000 = 5421, and 6532, 8754, 9865.
    # 4 5 6       100 1000
    # 7 8 9
    images = np.arange(1.0, 10.0, dtype=np.float32).reshape(1, 3, 3, 1)
    kernel = np.float32([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1)
    result = FORMS[name](images, kernel, stride=1)
    np.testing.assert_array_equal(
        result[0, :, :, 0], [[5421.0, 6532.0], [8754.0, 9865.0]]
    )


@pytest.mark.parametrize("name", FORMS)
def test_bytes_are_converted_and_receive_no_gradient(name):
    _, kernel, stride = make_operands(CASES[1])
    images = np.random.default_rng(0).integers(0, 256, (3, 7, 6, 2), np.uint8)
    form = functools.partial(FORMS[name], stride=stride)
    value, pull_back = jax.vjp(form, images, kernel)
    expected, pull_back_float = jax.vjp(form, np.float32(images), kernel)
    images_grad, kernel_grad = pull_back(value)
    assert images_grad.dtype == jax.dtypes.float0
    assert images_grad.shape == images.shape
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(kernel_grad, pull_back_float(value)[1], rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_half_precision_stays_half_precision(name):
    images, kernel, _ = make_operands(CASES[1])
    expected = references_networks.convolve(images, kernel, 1)
    half = functools.partial(FORMS[name], stride=1)
    value, pull_back = jax.vjp(
        half, jnp.asarray(images, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
    )
    gradients = pull_back(value)
    assert {value.dtype, *(g.dtype for g in gradients)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(np.float64(value), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", FORMS)
def test_vmap_is_a_loop(name):
    images, kernel, stride = make_operands(CASES[1])
    images = np.stack([images, 2.0 * images + 1.0])
    kernels = np.stack([kernel, kernel[::-1]])

    def gradients(images, kernel):
        loss = lambda *operands: jnp.sum(FORMS[name](*operands, stride=stride) ** 2)
        return jax.grad(loss, argnums=(0, 1))(images, kernel)

    together = jax.jit(jax.vmap(gradients))(images, kernels)
    for index in range(2):
        alone = gradients(images[index], kernels[index])
        for one, other in zip(together, alone):
            np.testing.assert_allclose(one[index], other, rtol=1e-4, atol=1e-2)


def test_forward_only_refuses_strides():
    with pytest.raises(ValueError, match="stride must be 1, got 2"):
        convolutions.convolve_forward_only(
            np.zeros((1, 4, 4, 1), np.float32),
            np.zeros((2, 2, 1, 1), np.float32),
            stride=2,
        )


@pytest.mark.parametrize("shape", [(16, 16, 2), (1, 16, 16, 3)])
def test_images_are_checked(shape):
    with pytest.raises(AssertionError):
        layers_value_and_gradients(
            np.zeros(shape, np.uint8), make_weights(), make_plan(None)
        )


ACTIVATIONS = {
    "relu": (jax.nn.relu, references_networks.relu, lambda x: x > 0.0),
    "elu": (
        convolutions.elu,
        references_networks.elu,
        lambda x: np.exp(np.minimum(x, 0.0)),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_activations_match_the_reference(name, dtype):
    activation, value, slope = ACTIVATIONS[name]
    x = jnp.asarray([-1e4, -100.0, -2.0, -0.5, -1e-3, 1e-3, 0.5, 2.0, 1e4], dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else 0.01
    y, pull_back = jax.vjp(activation, x)
    (gradient,) = pull_back(3.0 * jnp.ones_like(x))
    exact = np.float64(x)
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(np.float64(y), value(exact), tolerance, tolerance)
    np.testing.assert_allclose(
        np.float64(gradient), 3.0 * slope(exact), tolerance, tolerance
    )


def test_activations_at_zero():
    # As in every framework: relu's slope at 0 is 0, elu's is 1.
    assert jax.value_and_grad(jax.nn.relu)(0.0) == (0.0, 0.0)
    assert jax.value_and_grad(convolutions.elu)(0.0) == (0.0, 1.0)


LAYERS = (
    convolutions.LayerShape(3, 4, 2),
    convolutions.LayerShape(4, 3, 1),
    convolutions.LayerShape(5, 2, 2, padding="WHOLE"),
)


def make_weights(layers=LAYERS, channels=2):
    rng = np.random.default_rng(2)
    weights = []
    for layer in layers:
        shape = (layer.side, layer.side, channels, layer.features)
        weights.append(
            convolutions.LayerWeights(
                kernel=rng.normal(size=shape).astype(np.float32) / layer.side,
                bias=rng.normal(size=layer.features).astype(np.float32),
            )
        )
        channels = layer.features
    return weights


def make_plan(chunk_size, form=convolutions.convolve_windows, num_layers=3):
    return convolutions.Plan((form,) * num_layers, chunk_size)


def layers_value_and_gradients(images, weights, plan, dtype=jnp.float32):
    def loss(weights):
        result = convolutions.apply_layers(
            images,
            weights,
            layers=LAYERS,
            activation=convolutions.elu,
            dtype=dtype,
            plan=plan,
        )
        scale = jnp.arange(result.size, dtype=dtype).reshape(result.shape)
        return jnp.sum(jnp.sin(scale) * result), result

    (_, result), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
    return result, gradients


def test_layers_match_the_reference():
    images = np.random.default_rng(3).integers(0, 9, (3, 16, 14, 2), np.uint8)
    weights = make_weights()
    x = np.float64(images)
    for layer, (kernel, bias) in zip(LAYERS, weights):
        if layer.padding == "WHOLE":
            x = references_networks.pad_to_strides(x, layer.stride)
        x = references_networks.elu(
            references_networks.convolve(x, kernel, layer.stride) + bias
        )
    # 16 x 14 -> 7 x 6 -> 5 x 4, and padded to 6 x 4 -> 3 x 2.
    assert x.shape == (3, 3, 2, 5)
    result, _ = jax.jit(layers_value_and_gradients, static_argnums=(2,))(
        images, weights, make_plan(None)
    )
    np.testing.assert_allclose(result, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7])
def test_chunks_change_nothing(batch, chunk_size):
    images = np.random.default_rng(3).integers(0, 9, (batch, 16, 14, 2), np.uint8)
    weights = make_weights()
    value_and_gradients = jax.jit(layers_value_and_gradients, static_argnums=(2,))
    whole = value_and_gradients(
        images, weights, make_plan(None, convolutions.convolve_xla)
    )
    chunked = value_and_gradients(images, weights, make_plan(chunk_size))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_float_images_receive_their_gradient_through_chunks():
    images = np.random.default_rng(3).normal(size=(3, 16, 14, 2)).astype(np.float32)

    def gradient(plan):
        def loss(images):
            result = convolutions.apply_layers(
                images,
                make_weights(),
                layers=LAYERS,
                activation=convolutions.elu,
                dtype=jnp.float32,
                plan=plan,
            )
            return jnp.sum(jnp.square(result))

        return jax.jit(jax.grad(loss))(images)

    expected = gradient(make_plan(None, convolutions.convolve_xla))
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(gradient(make_plan(2)), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_gradients_are_summed_in_float32():
    # 512 equal images: a sum in bfloat16, whose integers end at 256, would stall.
    image = np.random.default_rng(3).integers(0, 9, (1, 16, 14, 2), np.uint8)

    def bias_gradient(images):
        def loss(weights):
            return jnp.sum(
                convolutions.apply_layers(
                    images,
                    weights,
                    layers=LAYERS,
                    activation=convolutions.elu,
                    dtype=jnp.bfloat16,
                    plan=make_plan(1),
                ).astype(jnp.float32)
            )

        return jax.jit(jax.grad(loss))(make_weights())[0].bias

    one, many = bias_gradient(image), bias_gradient(np.repeat(image, 512, axis=0))
    assert many.dtype == jnp.float32
    np.testing.assert_allclose(many, 512.0 * one, rtol=1e-5)


@pytest.mark.parametrize("side, stride", [(8, 4), (4, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("shape", [(20, 21), (7, 5)])
def test_same_padding_is_that_of_xla(side, stride, shape):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    layer = convolutions.LayerShape(4, side, stride, padding="SAME")
    (weights,) = make_weights((layer,), channels=3)
    result = convolutions.apply_layers(
        images,
        (weights,),
        layers=(layer,),
        activation=lambda x: x,
        dtype=jnp.float32,
        plan=make_plan(None, num_layers=1),
    )
    expected = jax.lax.conv_general_dilated(
        images,
        weights.kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(result, np.asarray(expected) + weights.bias, atol=1e-4)


def test_padding_leaves_no_pixel_unseen():
    layer = convolutions.LayerShape(1, 5, 5, padding="WHOLE")
    weights = convolutions.LayerWeights(
        kernel=np.ones((5, 5, 1, 1), np.float32), bias=np.zeros(1, np.float32)
    )

    def total(images):
        result = convolutions.apply_layers(
            images,
            [weights],
            layers=[layer],
            activation=jax.nn.relu,
            dtype=jnp.float32,
            plan=make_plan(None, num_layers=1),
        )
        assert result.shape == (1, 2, 3, 1)
        return jnp.sum(result)

    gradient = jax.grad(total)(np.ones((1, 7, 11, 1), np.float32))
    np.testing.assert_array_equal(gradient, 1.0)


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match=r"\(7, 16, 2\) are too small for LayerShape"):
        layers_value_and_gradients(
            np.zeros((1, 7, 16, 2), np.uint8), make_weights(), make_plan(None)
        )


@pytest.mark.parametrize("what", ["weights", "forms"])
def test_layers_weights_and_forms_must_correspond(what):
    weights = make_weights()[: 2 if what == "weights" else 3]
    plan = make_plan(None, num_layers=2 if what == "forms" else 3)
    with pytest.raises(AssertionError):
        layers_value_and_gradients(np.zeros((1, 16, 16, 2), np.uint8), weights, plan)
