"""Tests of the benchmark's encoders: PyTorch computes the same network."""

import numpy as np
import pytest

from experiments.benchmark import encoders, parts, setup, table


@pytest.mark.parametrize("encoder", ["small", "nature"])
def test_all_steps_compute_the_same_network(encoder):
    # PyTorch's steps take part where it is installed.
    steps = encoders.make_steps(encoder, batch=2)
    output, (gradient,) = steps.pop("ours")()
    assert output.shape == (2, {"small": 256, "nature": 512}[encoder])
    assert bool(steps) == (encoders.torch() is not None)
    kernel = np.asarray(gradient["params"]["conv_0"]["kernel"]).transpose(3, 2, 0, 1)
    for step in steps.values():
        other, gradients = step()
        np.testing.assert_allclose(other.detach(), output, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(gradients[0], kernel, rtol=1e-3, atol=1e-3)


def test_the_rate_is_compared_with_the_faster_layout(monkeypatch):
    seconds = {"ours": 0.25, "torch": 1.0, "torch channels last": 0.5}
    now = [0.0]

    def make_steps(encoder, batch):
        assert (encoder, batch) == ("small", 2)

        def make_step(name):
            def step():
                now[0] += seconds[name]

            return step

        return {name: make_step(name) for name in seconds}

    monkeypatch.setattr(encoders, "make_steps", make_steps)
    monkeypatch.setattr(encoders, "torch", lambda: True)
    monkeypatch.setattr(table.time, "perf_counter", lambda: now[0])
    (row,) = parts.encoder_rows(setup.SMOKE)
    # Two images in 0.25 s: 8 a second, twice the better layout's.
    assert (row.measured, row.limit, row.ratio, row.is_met) == (8.0, 4.0, 2.0, True)
