"""Installs aps_jax, its experiment scripts and what they need."""

import pathlib

import setuptools

_ROOT = pathlib.Path(__file__).resolve().parent
# Gymnax imports six, and does not declare it.
_WORLDS = ["gymnax>=1.0.1", "six>=1.17"]


def _requirements() -> list[str]:
    lines = (_ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setuptools.setup(
    name="aps_jax",
    version="0.1.0",
    description="APS: Active Pretraining with Successor Features, in JAX on Atari.",
    long_description=(_ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["aps_jax*", "experiments*"]),
    package_data={"aps_jax": ["py.typed"], "aps_jax.scores": ["data/*"]},
    install_requires=_requirements(),
    extras_require={
        # What the tests compare with, the linter and the type checker.
        "dev": [
            "distrax>=0.1.9",
            *_WORLDS,
            "hypothesis>=6.170",
            "mypy>=2.4",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "scipy>=1.17",
            "submitit>=1.5",
        ],
        "worlds": _WORLDS,  # MinAtar
        # To run on such devices, and to compile for them without one
        # (experiments.compile); CUDA's needs Python 3.12.
        "cuda": ["jax[cuda13]>=0.10.2"],
        "tpu": ["libtpu>=0.0.52"],
        "sweep": ["submitit>=1.5"],  # sweep --run=slurm
        "wandb": ["wandb>=0.21"],
        "docs": ["sphinx>=9.0", "myst-parser>=5.0"],
    },
)
