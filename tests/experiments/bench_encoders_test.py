"""Tests for the measurement of the encoders."""

import jax
import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from experiments import bench_encoders


@pytest.fixture(autouse=True)
def parsed_flags():
    """Lets the tests read flags, each at its default unless a test sets it."""
    with flagsaver.flagsaver():
        flags.FLAGS.mark_as_parsed()
        yield


def test_all_forms_compute_the_same_network():
    # PyTorch's rows take part where it is installed.
    steps = bench_encoders.make_steps("small", batch=2)
    assert set(steps) >= {"chosen", "xla", "windows"}
    output, (gradient,) = steps["xla"]()
    assert output.shape == (2, 256)
    for name in ("chosen", "windows"):
        np.testing.assert_allclose(steps[name]()[0], output, rtol=1e-4, atol=1e-5)
    if bench_encoders.torch is not None:
        conv = gradient["params"]["conv_0"]
        for name in ("torch", "torch channels last"):
            other, gradients = steps[name]()
            np.testing.assert_allclose(other.detach(), output, rtol=1e-4, atol=1e-5)
            kernel = np.asarray(conv["kernel"]).transpose(3, 2, 0, 1)
            np.testing.assert_allclose(gradients[0], kernel, rtol=1e-3, atol=1e-3)


def make_fake_steps(monkeypatch, seconds):
    """Replaces steps by advances of a fake clock, and returns the order of turns."""
    now, turns = [0.0], []

    def make_step(name):
        def step():
            turns.append(name)
            now[0] += seconds[name]

        return step

    monkeypatch.setattr(
        bench_encoders,
        "make_steps",
        lambda encoder, batch, forms: {name: make_step(name) for name in seconds},
    )
    monkeypatch.setattr(bench_encoders.time, "perf_counter", lambda: now[0])
    return turns


def test_rates_are_images_per_second_of_turns_that_alternate(monkeypatch):
    turns = make_fake_steps(
        monkeypatch, {"chosen": 0.25, "torch": 1.0, "torch channels last": 0.5}
    )
    rows = bench_encoders.measure(["small"], [8], repetitions=2, seconds=0.5)
    # Each turn is a step for warming up, then as many as fill half a second.
    once = ["chosen"] * 3 + ["torch"] * 2 + ["torch channels last"] * 2
    assert turns == once * 2
    # 8 images in 0.25 s are 32 a second: twice PyTorch's better layout.
    assert rows == [
        ("small", 8, "chosen", 32.0, 2.0),
        ("small", 8, "torch", 8.0, 0.5),
        ("small", 8, "torch channels last", 16.0, 1.0),
    ]
    assert bench_encoders.NO_TORCH not in bench_encoders.format_rows(rows)


def test_without_pytorch_the_table_says_so(monkeypatch):
    make_fake_steps(monkeypatch, {"chosen": 0.001, "xla": 0.002})
    rows = bench_encoders.measure(["nature"], [32], repetitions=5, seconds=0.0)
    assert [row.ratio_to_torch for row in rows] == [None, None]
    table = bench_encoders.format_rows(rows).splitlines()
    assert table[1].split() == ["nature", "32", "chosen", "32,000", "-"]
    assert table[-1] == bench_encoders.NO_TORCH


@pytest.mark.parametrize(
    "encoders, batches, repetitions, message",
    [
        (["tiny"], [1], 5, r"small, nature, paper, got \['tiny'\]"),
        (["small"], [0], 5, r"batches \[0\]"),
        (["small"], [1], 0, "repetitions=0"),
    ],
)
def test_nonsense_is_refused(encoders, batches, repetitions, message):
    with pytest.raises(ValueError, match=message):
        bench_encoders.measure(encoders, batches, repetitions=repetitions, seconds=0.0)


def test_plans_fit_their_encoders():
    for name, encoder in bench_encoders.ENCODERS.items():
        for plan in bench_encoders.plans(name).values():
            assert len(plan.forms) == len(encoder.layers)
        chosen = bench_encoders.plans(name)["chosen"]
        assert (chosen.chunk_size is None) == (jax.default_backend() != "cpu")


def test_the_script_prints_a_table(monkeypatch, capsys):
    make_fake_steps(monkeypatch, {"chosen": 0.5})
    with flagsaver.flagsaver(encoders=["paper"], batches=["4"], turn_seconds=1.0):
        bench_encoders.main(["bench_encoders"])
    header, row, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["encoder", "batch", "form", "images/s", "to", "PyTorch"]
    assert row.split() == ["paper", "4", "chosen", "8", "-"]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"encoders": ["tiny"]}, "error: encoders are small"),
        ({"batches": ["many"]}, "error: invalid literal"),
    ],
    ids=["encoder", "batch"],
)
def test_the_script_refuses_nonsense_in_a_line(values, message):
    with flagsaver.flagsaver(**values), pytest.raises(SystemExit, match=message):
        bench_encoders.main(["bench_encoders"])
    with pytest.raises(app.UsageError, match="Unexpected"):
        bench_encoders.main(["bench_encoders", "small"])
