"""Runs the examples."""

import importlib.util
import pathlib

FOLDER = pathlib.Path(__file__).parents[2] / "examples"


def load(name):
    """Imports an example by its path: the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_dqn_that_imports_ours_goes_where_it_is_asked():
    """Without reward it learned to reach either end; untrained it does not."""
    # Written for JAX's own settings, not for this suite's strict ones.
    module = load("plug_into_dqn")
    ends = {}
    rank = module.jax.numpy_rank_promotion("allow")
    dtype = module.jax.numpy_dtype_promotion("standard")
    with rank, dtype:
        for num_steps in (3_000, 1):
            ends[num_steps] = module.main(num_steps)
    # The rewards were for the five cells at each end of fifteen.
    assert ends[3_000][0] < 5 and ends[3_000][14] > 9
    assert not (ends[1][0] < 5 and ends[1][14] > 9)
