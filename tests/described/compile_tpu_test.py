"""Compiles agents for a described TPU, which `libtpu` alone makes possible."""

import pytest

from aps_jax import config as config_lib
from experiments import compile as compile_script


@pytest.mark.parametrize("agent", ["aps", "spr"])
def test_the_smallest_programs_compile_and_fit(agent):
    device, there = compile_script.describe("tpu", "v5e:1x1")
    config = config_lib.preset_config("smoke", agent)
    for program in compile_script.programs(config, there):
        weight = compile_script.weigh(program, device, "tpu", is_half=False)
        assert weight.arguments + weight.temporaries < device.memory
        assert weight.flops > 0 and weight.moved > 0
        assert not [name for name in weight.listed.calls if "callback" in name]
