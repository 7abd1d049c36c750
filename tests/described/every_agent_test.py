"""Compiles every agent for a described TPU, and for a GPU where its compiler is."""

import importlib.util

import pytest
from scripts import run_script

from aps_jax.agents import AGENTS

# `pip install '.[tpu]'` is small, and `make test-described` makes it; '.[cuda]' is not.
DEVICES = {"tpu": "v5e:1x1"}
if importlib.util.find_spec("jax_plugins"):
    DEVICES["cuda"] = "h100"


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("agent", AGENTS)
def test_the_smallest_programs_compile_and_fit(agent, platform):
    done = run_script(
        "compile",
        *(f"--platform={platform}", f"--topology={DEVICES[platform]}"),
        *("--preset=smoke", f"--agent={agent}"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    programs = {row[0]: row for row in rows if row and row[0] in ("acting", "update")}
    assert len(programs) == 2, done.stdout
    assert all("yes" in row for row in programs.values())
    assert "callback" not in done.stdout
    assert "at most" in done.stdout
