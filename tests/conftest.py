"""Makes JAX strict and its programs cheap for every test; fixtures of several rooms.

Warnings are errors by pyproject.toml. The settings are environment variables, so that
the processes that tests start are as strict.
"""

import importlib.metadata
import os
import pathlib
import signal
import tempfile

import pytest
from absl import flags
from absl.testing import flagsaver

import experiments  # noqa: F401  Garbage is collected as seldom as in the scripts.

_CACHE = pathlib.Path(tempfile.gettempdir(), f"aps_jax_test_cache_{os.getuid()}")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Tests compile much and run little: without LLVM's optimisations they take half as
# long, and XLA's older code for fusions compiles in a third of the time. JAX 0.12 has
# it no more.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    # Splitting programs between threads costs an eighth more, and all cores are busy.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A worker of pytest keeps to one core: a tenth of the processor time less.
if _WORKER := os.environ.get("PYTEST_XDIST_WORKER", ""):
    _CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_CORES[int(_WORKER.removeprefix("gw")) % len(_CORES)]})

import warnings

with warnings.catch_warnings():
    # Importing TensorFlow Probability (under Distrax) touches a deprecated name of JAX.
    warnings.simplefilter("ignore")
    import distrax  # noqa: F401


@pytest.fixture
def hangup_is_noticed():
    """SIGHUP arrives also under `nohup`, which has it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def parsed_flags():
    """Flags as after parsing an empty command line, restored after each test."""
    with flagsaver.flagsaver():
        flags.FLAGS(["test"])
        yield


@pytest.fixture(scope="module")
def few_states():
    """Measures and draws fewer states at a row: they are most of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aps_jax.train.loop.CALIBRATION_STATES", 64)
        patch.setattr("aps_jax.train.loop.EMBEDDED_STATES", 16)
        yield
