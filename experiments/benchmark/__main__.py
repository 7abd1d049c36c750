"""Runs `python -m experiments.benchmark`."""

from experiments import benchmark, common_flags

if __name__ == "__main__":
    common_flags.run(benchmark.main, short=("workdir",))
