"""Compiles every agent for a described TPU, and for a GPU where its compiler is."""

import importlib.util

import pytest
from scripts import run_script

from aps_jax.agents import AGENTS

# `pip install '.[tpu]'` is small, and `make test-described` makes it; '.[cuda]' is not.
ONE, FOUR = {"tpu": "v5e:1x1"}, {"tpu": "v5e:2x2"}
if importlib.util.find_spec("jax_plugins"):
    ONE["cuda"], FOUR["cuda"] = "h100", "h100:4"
CASES = [(agent, *on, 1) for agent in AGENTS for on in ONE.items()]
CASES += [("aps", *on, 4) for on in FOUR.items()]


@pytest.mark.parametrize("agent, platform, topology, num_devices", CASES)
def test_the_smallest_programs_compile_and_fit(agent, platform, topology, num_devices):
    done = run_script(
        "compile",
        *(f"--platform={platform}", f"--topology={topology}"),
        *("--preset=smoke", f"--agent={agent}", f"--num_devices={num_devices}"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    programs = {row[0]: row for row in rows if row and row[0] in ("acting", "update")}
    assert len(programs) == 2, done.stdout
    assert all("yes" in row for row in programs.values())
    assert "callback" not in done.stdout
    assert "at most" in done.stdout
