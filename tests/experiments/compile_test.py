"""Tests of experiments.compile: what it reads, what it weighs, what it refuses."""

import jax
import numpy as np
import pytest

from aps_jax import config as config_lib
from experiments import compile as compile_script

TEXT = """HloModule jit_learn, is_scheduled=true

%fused_computation (p: f32[2,3]) -> f32[2,3] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %inner = f32[2,3]{1,0} custom-call(%p), custom_call_target="never"
}

%body (state: (f32[2,3], s32[])) -> (f32[2,3], s32[]) {
  %state = (f32[2,3]{1,0}, s32[]) parameter(0)
  %one = f32[2,3]{1,0} get-tuple-element(%state), index=0
  ROOT %step = f32[2,3]{1,0} fusion(%one), kind=kLoop, calls=%fused_computation
}

ENTRY %main (replay: u8[1024,1024,1024], x: bf16[4]) -> f32[2,3] {
  %replay = u8[1024,1024,1024]{2,1,0} parameter(0)
  %x = bf16[4]{0} parameter(1)
  %fast = f32[8,8]{1,0:T(8,128)S(1)} fusion(%replay), calls=%fused_computation
  %rows = f32[2,3]{1,0:T(8,128)} fusion(%replay, %x, %fast), calls=%fused_computation
  %sum = f32[2,3]{1,0} all-reduce(%rows), channel_id=1, to_apply=%add
  %call = (f32[5,5]{0,1}, pred[8]{0}) custom-call(%sum), custom_call_target="eigh"
  ROOT %end = f32[2,3]{1,0} bitcast(%sum)
}
"""


def test_a_program_is_read_as_by_hand():
    found = compile_script.list_kernels(TEXT)
    # The body's fusion, and four of main; what lies in a fusion is no kernel.
    assert found.kernels == 5
    assert found.calls == {"eigh": 1}
    assert (found.collectives, found.collective_bytes) == (1, 24.0)
    # Body 24 + 24; rows 24 and x of 8, without the replay and what lies in a TPU's fast
    # memory; sum 24 + 24; call 108 + 24.
    assert found.moved == 48 + 32 + 48 + 132


@pytest.mark.parametrize("num_devices", [1, 2])
def test_programs_are_those_of_the_loop_and_are_weighed(num_devices, monkeypatch):
    config = config_lib.replace_options(
        config_lib.preset_config("smoke"),
        game="maze/four_rooms",
        encoder="mlp",
        num_devices=num_devices,
    )
    there = jax.devices()[:1] * num_devices
    if num_devices > 1:  # Shapes alone: this process has one device.
        names = [one.name for one in compile_script.programs(config, there)]
        assert names == ["acting", "update"]
        return
    found = list(compile_script.programs(config, there))
    assert [one.name for one in found] == ["acting", "update", "loop"]
    # An update has half a sample of 8 per agent step; 4 environments act together.
    assert [one.per_step for one in found] == [1 / 4, 0.5 / 8, 0.0]
    device = compile_script.DEVICES["v5e"]._replace(launch=1.0)
    weights = [compile_script.weigh(p, device, "cpu", is_half=False) for p in found]
    for program, weight in zip(found, weights, strict=True):
        given = sum(
            np.prod(x.shape) * x.dtype.itemsize
            for x in jax.tree.leaves(program.arguments)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )
        # The compiler drops what is not used.
        assert 0.5 * given < weight.arguments < 1.5 * given
        assert weight.flops > 0 and weight.listed.kernels > 0
        # A second for each launch is most of the least time.
        assert weight.least_seconds == pytest.approx(weight.listed.kernels, abs=0.1)
    # As with CUDA's compiler, which counts nothing: the program's as it was given.
    monkeypatch.setattr(jax.stages.Compiled, "cost_analysis", lambda _: None)
    again = compile_script.weigh(found[0], device, "cpu", is_half=False)
    assert again.flops == pytest.approx(weights[0].flops, rel=0.3)


@pytest.mark.parametrize(
    "platform, topology, message",
    [
        ("cuda", "v5e:2x2", "must begin with one of h100, h200 for --platform=cuda"),
        ("tpu", "a100", "must begin with one of v5e, v5p, v6e for --platform=tpu"),
        ("tpu", "v5e:2x2", r"needs its compiler: pip install 'aps_jax\[tpu\]'"),
        ("cuda", "h100", r"needs its compiler: pip install 'aps_jax\[cuda\]'"),
    ],
)
def test_what_cannot_be_described_is_one_line(platform, topology, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        compile_script.describe(platform, topology)
