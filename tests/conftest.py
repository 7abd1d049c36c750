"""Makes JAX strict for every test: promotion errors, CPU, and a shared compile cache.

Warnings are errors by pyproject.toml. The settings are environment variables, so that
the processes that tests start are as strict.
"""

import os
import pathlib
import tempfile

_CACHE = pathlib.Path(tempfile.gettempdir(), f"aps_jax_test_cache_{os.getuid()}")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Tests compile much and run little: without LLVM's optimisations they take half as long.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import warnings

with warnings.catch_warnings():
    # Importing TensorFlow Probability (under Distrax) touches a deprecated name of JAX.
    warnings.simplefilter("ignore")
    import distrax  # noqa: F401
