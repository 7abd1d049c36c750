"""Tests for the encoders, the feature network and the successor network."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_networks

from aps_jax.networks import convolutions, modules

# Per encoder: the smallest kind of image with several output pixels, for speed.
ENCODERS = {
    "small": (modules.SmallEncoder, (26, 31, 2), references_networks.small),
    "nature": (modules.NatureEncoder, (44, 52, 2), references_networks.nature),
    "paper": (modules.PaperEncoder, (17, 19, 2), references_networks.paper),
}
ALL_ENCODERS = pytest.mark.parametrize("name", ENCODERS)


def make_images(name, leading, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*leading, *ENCODERS[name][1]), np.uint8)


def make_plans(name):
    num_layers = len(ENCODERS[name][0].layers)
    forms = [convolutions.convolve_windows] * num_layers
    if name == "paper":
        forms[1:] = [convolutions.convolve_forward_only] * 3
    elif name == "nature":
        forms[2] = convolutions.convolve_forward_only
    xla = convolutions.convolve_xla
    return {
        "xla": convolutions.Plan((xla,) * num_layers, None),
        "mixed": convolutions.Plan(tuple(forms), 2),
    }


def init(module, *operands):
    return jax.jit(module.init)(jax.random.key(0), *operands)


def random_params(module, *operands):
    """Parameters of the size that they start with, and biases that tests can see."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *operands)
    rng = np.random.default_rng(5)

    def draw(x):
        scale = 0.1 if x.ndim == 1 else 1 / np.sqrt(np.prod(x.shape[:-1]))
        return np.float32(scale * rng.normal(size=x.shape))

    return jax.tree.map(draw, shapes)


@pytest.mark.parametrize(
    "name, leading",
    [
        ("small", ()),
        ("small", (2, 3)),
        ("small", (1,)),
        ("nature", (3,)),
        ("paper", (3,)),
    ],
)
def test_encoder_matches_the_reference(name, leading):
    encoder, image_shape, reference = ENCODERS[name]
    images = make_images(name, leading)
    params = random_params(encoder(), images)
    expected = reference(params["params"], images.reshape(-1, *image_shape))
    output = jax.jit(encoder().apply)(params, images)
    assert output.dtype == jnp.float32
    assert output.shape == (*leading, expected.shape[1])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        output.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "name, leading",
    [
        ("small", ()),
        ("small", (1,)),
        ("small", (2, 3)),
        ("nature", (1,)),
        ("nature", (5,)),
        ("paper", (1,)),
        ("paper", (5,)),
    ],
)
def test_forms_agree_in_value_and_gradient(name, leading):
    encoder, _, _ = ENCODERS[name]
    images = make_images(name, leading)
    params = random_params(encoder(), images)

    def value_and_gradient(plan):
        module = encoder(plan=plan)

        @jax.jit
        def apply(params):
            output, pull_back = jax.vjp(lambda p: module.apply(p, images), params)
            return output, pull_back(jnp.cos(output))

        return jax.device_get(apply(params))

    results = {key: value_and_gradient(plan) for key, plan in make_plans(name).items()}
    width = results["xla"][0].shape[-1]
    assert results["xla"][0].shape == (*leading, width)
    for one, other in zip(*map(jax.tree.leaves, results.values())):
        scale = np.abs(one).max()
        np.testing.assert_allclose(one / scale, other / scale, rtol=0, atol=1e-5)


def test_float_images_are_in_the_units_of_bytes():
    images = make_images("small", (2,))
    encoder = modules.SmallEncoder()
    params, apply = random_params(encoder, images), jax.jit(encoder.apply)
    np.testing.assert_allclose(
        apply(params, np.float32(images)), apply(params, images), rtol=1e-5, atol=1e-6
    )


@ALL_ENCODERS
def test_parameters_depend_on_no_form_and_no_compute_dtype(name):
    encoder, _, _ = ENCODERS[name]
    image = make_images(name, ())
    modules = [encoder(plan=plan) for plan in (None, *make_plans(name).values())]
    modules.append(encoder(dtype=jnp.bfloat16))
    shapes = [
        jax.eval_shape(module.init, jax.random.key(0), image) for module in modules
    ]
    assert all(s == shapes[0] for s in shapes)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes[0]))


@pytest.mark.parametrize("name", ["small", "paper"])
def test_bfloat16_computes_the_same_roughly(name):
    encoder, _, _ = ENCODERS[name]
    images = make_images(name, (3,))
    params = init(encoder(), images)

    def value_and_gradient(dtype):
        module = encoder(dtype=dtype)

        @jax.jit
        def apply(params):
            output, pull_back = jax.vjp(lambda p: module.apply(p, images), params)
            return output, pull_back(jnp.cos(output))

        return jax.device_get(apply(params))

    exact, rough = value_and_gradient(jnp.float32), value_and_gradient(jnp.bfloat16)
    for one, other in zip(jax.tree.leaves(exact), jax.tree.leaves(rough)):
        assert other.dtype == jnp.float32
        difference = np.linalg.norm(one - other) / np.linalg.norm(one)
        assert 1e-5 < difference < 0.05


# By hand, for 84 x 84 x 4 images. Each layer: inputs x outputs + biases.
PARAMETER_COUNTS = {
    # 5*5*4*32 + 32, 5*5*32*64 + 64, (4*4*64 = 1024)*256 + 256
    "small": 3_232 + 51_264 + 262_400,
    # 8*8*4*32 + 32, 4*4*32*64 + 64, 3*3*64*64 + 64, (7*7*64 = 3136)*512 + 512
    "nature": 8_224 + 32_832 + 36_928 + 1_606_144,
    # 3*3*4*32 + 32, and three times 3*3*32*32 + 32
    "paper": 1_184 + 3 * 9_248,
}
WIDTHS = {"small": 256, "nature": 512, "paper": 35 * 35 * 32}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@ALL_ENCODERS
def test_parameter_counts(name):
    encoder = ENCODERS[name][0]()
    key, image = jax.random.key(0), np.zeros((84, 84, 4), np.uint8)
    output, variables = jax.eval_shape(encoder.init_with_output, key, image)
    assert output.shape == (WIDTHS[name],)
    assert count(variables) == PARAMETER_COUNTS[name]

    features = modules.FeatureNetwork(encoder, feature_dim=5)
    variables = jax.eval_shape(features.init, key, image)
    head = WIDTHS[name] * 5 + 5
    assert count(variables) == PARAMETER_COUNTS[name] + head

    successor = modules.SuccessorNetwork(
        encoder, num_actions=6, feature_dim=5, hidden=512, exploration_head=True
    )
    variables = jax.eval_shape(successor.init, key, image, np.zeros((1, 5), np.float32))
    # State, task (without a bias of its own), psi, exploration.
    heads = (WIDTHS[name] * 512 + 512) + 5 * 512 + (512 * 30 + 30) + (512 * 6 + 6)
    assert count(variables) == PARAMETER_COUNTS[name] + heads


@pytest.mark.parametrize(
    "name, num_windows, chunk_size",
    [("small", 2, 64), ("nature", 3, 16), ("paper", 1, 4)],
)
def test_plans_by_backend(name, num_windows, chunk_size):
    layers = ENCODERS[name][0].layers
    plan = convolutions.choose_plan("cpu", (84, 84, 4), layers)
    windows, forward = convolutions.convolve_windows, convolutions.convolve_forward_only
    num_forward = len(layers) - num_windows
    assert plan.forms == (windows,) * num_windows + (forward,) * num_forward
    assert plan.chunk_size == chunk_size
    for backend in ("gpu", "tpu"):
        plan = convolutions.choose_plan(backend, (84, 84, 4), layers)
        assert plan == ((convolutions.convolve_xla,) * len(layers), None)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_default_plan_is_that_of_the_platform_compiled_for(platform):
    images = make_images("small", (2,))
    params = random_params(modules.SmallEncoder(), images)
    traced = jax.jit(modules.SmallEncoder().apply).trace(params, images)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Its plan for CPUs has products of windows alone.
    assert ("stablehlo.convolution" in text) == (platform != "cpu")


@pytest.mark.parametrize(
    "observation, error",
    [
        (np.zeros((84, 84), np.uint8), ValueError),
        (np.zeros((84, 84, 4), np.int32), AssertionError),
    ],
    ids=["rank", "dtype"],
)
def test_what_is_no_image_is_refused(observation, error):
    with pytest.raises(error):
        jax.eval_shape(modules.SmallEncoder().init, jax.random.key(0), observation)


def test_mlp_encoder_matches_by_hand():
    encoder = modules.MlpEncoder(hidden=2)
    kernel = np.float32([[1, 0], [2, 1], [0, -3]])
    params = {"params": {"hidden": {"kernel": kernel, "bias": np.float32([0, 1])}}}
    # Planes (1, 1, 0): relu(1 + 2, 1 + 1); and (0, 0, 1): relu(0, -3 + 1).
    planes = np.uint8([[1, 1, 0], [0, 0, 1]]).reshape(2, 1, 3, 1)
    np.testing.assert_array_equal(
        encoder.apply(params, planes), np.float32([[3, 2], [0, 0]])
    )


def test_minatar_encoder_sees_planes_as_they_are_and_has_the_papers_layers():
    planes = np.random.default_rng(0).integers(0, 2, (2, 10, 10, 4), dtype=np.uint8)
    encoder = modules.MinAtarEncoder()
    params = random_params(encoder, planes)
    # By hand: 3x3x4 to 16, then 8x8x16 to 128.
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == (36 * 16 + 16) + (1024 * 128 + 128)
    own = params["params"]
    windows = np.lib.stride_tricks.sliding_window_view(planes, (3, 3), axis=(1, 2))
    conv = np.einsum("bijchw,hwco->bijo", windows, np.float64(own["conv_0"]["kernel"]))
    flat = np.maximum(conv + own["conv_0"]["bias"], 0).reshape(2, -1)
    expected = references_networks.relu(references_networks.dense(flat, own["hidden"]))
    np.testing.assert_allclose(
        jax.jit(encoder.apply)(params, planes), expected, rtol=1e-4, atol=1e-5
    )


def make_maze_states(leading=(3,)):
    rng = np.random.default_rng(0)
    return np.eye(7, dtype=np.uint8)[rng.integers(0, 7, leading)][..., None, None]


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)], ids=str)
def test_features_lie_on_the_sphere(dim, leading):
    network = modules.FeatureNetwork(modules.MlpEncoder(8), feature_dim=dim)
    states = make_maze_states(leading)
    features = jax.jit(network.apply)(random_params(network, states), states)
    assert features.h.shape == features.phi.shape == (*leading, dim)
    norm = np.linalg.norm(np.float64(features.h), axis=-1, keepdims=True)
    np.testing.assert_allclose(features.phi, features.h / norm, rtol=1e-5)


@ALL_ENCODERS
def test_black_images_keep_everything_finite(name):
    # Biases start at 0, so a black image has h = 0, which has no direction.
    encoder, image_shape, _ = ENCODERS[name]
    network = modules.FeatureNetwork(encoder(), feature_dim=5)
    black = np.zeros((1, *image_shape), np.uint8)
    params = init(network, black)

    def loss(params):
        features = network.apply(params, black)
        return jnp.sum(features.phi), features

    with jax.debug_nans(True):
        gradient, features = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(features.h, 0.0)
    np.testing.assert_array_equal(features.phi, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_one_broken_image_breaks_no_other():
    images = np.float32(make_images("small", (3,)))
    params = random_params(modules.SmallEncoder(), images)
    apply = jax.jit(modules.SmallEncoder(plan=make_plans("small")["mixed"]).apply)
    intact = apply(params, images)
    images[1, 3, 3, 0] = np.nan
    broken = apply(params, images)
    assert np.isnan(broken[1]).any()
    np.testing.assert_array_equal(broken[::2], intact[::2])


def test_every_parameter_learns_from_phi():
    network = modules.FeatureNetwork(modules.SmallEncoder(), feature_dim=5)
    images = make_images("small", (4,))
    params = init(network, images)
    w = np.float32([0.5, -0.5, 0.5, -0.5, 0.0])

    def loss(params):
        return jnp.sum(network.apply(params, images).phi @ w)

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(np.abs(leaf).max() > 0.0 for leaf in jax.tree.leaves(gradient))


class RecordingEncoder(nn.Module):
    """Reports the shape of what it encodes each time that it runs."""

    record: Callable[[tuple[int, ...]], None]

    @nn.compact
    def __call__(self, observation):
        self.record(observation.shape)
        return nn.Dense(4)(observation[..., 0, 0].astype(jnp.float32))


def make_successor(encoder, dim=2, num_actions=3, exploration_head=True):
    return modules.SuccessorNetwork(
        encoder, num_actions, dim, hidden=8, exploration_head=exploration_head
    )


def make_tasks(leading, num, dim):
    rng = np.random.default_rng(4)
    tasks = rng.normal(size=(*leading, num, dim))
    return (tasks / np.linalg.norm(tasks, axis=-1, keepdims=True)).astype(np.float32)


def test_the_encoder_runs_once_for_all_tasks():
    calls = []
    network = make_successor(RecordingEncoder(calls.append))
    states, tasks = make_maze_states((5,)), make_tasks((5,), 11, 2)
    params = random_params(network, states, tasks)
    calls.clear()
    jax.eval_shape(network.apply, params, states, tasks)
    assert calls == [(5, 7, 1, 1)]


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("num_tasks", [1, 4])
@pytest.mark.parametrize("leading", [(), (1,), (2, 3)], ids=str)
def test_successor_matches_the_reference(dim, num_tasks, leading):
    encoder = modules.MlpEncoder(6)
    network = make_successor(encoder, dim)
    states, tasks = make_maze_states(leading), make_tasks(leading, num_tasks, dim)
    params = random_params(network, states, tasks)
    output = jax.jit(network.apply)(params, states, tasks)
    assert output.psi.shape == (*leading, num_tasks, 3, dim)
    assert output.exploration.shape == (*leading, num_tasks, 3)

    params = params["params"]
    for index in np.ndindex(*leading, num_tasks):
        encoded = references_networks.relu(
            references_networks.dense(
                states[index[:-1]].reshape(-1), params["encoder"]["hidden"]
            )
        )
        psi, exploration = references_networks.successor(
            params, encoded, tasks[index], num_actions=3
        )
        np.testing.assert_allclose(output.psi[index], psi, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            output.exploration[index], exploration, rtol=1e-4, atol=1e-6
        )


def test_without_the_head_there_is_no_exploration():
    network = make_successor(modules.MlpEncoder(6), exploration_head=False)
    states, tasks = make_maze_states(), make_tasks((3,), 2, 2)
    output, params = jax.eval_shape(
        network.init_with_output, jax.random.key(0), states, tasks
    )
    assert "exploration" not in params["params"]
    assert output.exploration is None


@pytest.mark.parametrize(
    "tasks",
    [
        np.zeros((3, 2), np.float32),  # Without the K axis.
        np.zeros((3, 4, 5), np.float32),  # Of another dimension.
        np.zeros((2, 4, 2), np.float32),  # For another batch.
        np.zeros((3, 4, 2), np.int32),
    ],
    ids=["rank", "dim", "batch", "dtype"],
)
def test_tasks_are_checked(tasks):
    network = make_successor(modules.MlpEncoder(6))
    with pytest.raises(AssertionError):
        jax.eval_shape(network.init, jax.random.key(0), make_maze_states((3,)), tasks)


def test_psi_depends_on_the_task():
    network = make_successor(modules.MlpEncoder(6))
    state, tasks = make_maze_states(()), make_tasks((), 2, 2)
    psi = jax.jit(network.apply)(init(network, state, tasks), state, tasks).psi
    assert np.abs(psi[0] - psi[1]).max() > 1e-3


@ALL_ENCODERS
def test_values_start_small_and_different(name):
    network = modules.SuccessorNetwork(ENCODERS[name][0](), 6, 5, exploration_head=True)
    images, tasks = make_images(name, (2,)), make_tasks((2,), 8, 5)
    output = jax.jit(network.apply)(init(network, images, tasks), images, tasks)
    q = np.einsum("...kad,...kd->...ka", output.psi, tasks)
    for values in (q, output.exploration):
        assert np.abs(values).max() < 0.5
        assert np.std(values, axis=-1).min() > 1e-3
