"""Compiles agents for a described TPU, which `libtpu` alone makes possible."""

import pytest
from scripts import run_script


@pytest.mark.parametrize("agent", ["aps", "spr"])
def test_the_smallest_programs_compile_and_fit(agent):
    done = run_script(
        "compile",
        *("--platform=tpu", "--topology=v5e:1x1", "--preset=smoke", f"--agent={agent}"),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    programs = {row[0]: row for row in rows if row and row[0] in ("acting", "update")}
    assert len(programs) == 2, done.stdout
    assert all("yes" in row for row in programs.values())
    assert "callback" not in done.stdout
    assert "at most" in done.stdout
