"""Runs `python -m experiments.maze`."""

from experiments import common_flags, maze

if __name__ == "__main__":
    common_flags.run(maze.main, short=("workdir", "seed", "num_seeds"))
