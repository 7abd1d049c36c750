"""Reward functions of some games, as a user may write them, of the console's memory.

  python -m experiments.evaluate --checkpoint=runs/pretrain --workdir=runs/zero \
    --reward=score,survival,examples.rewards:freeway_middle

Each takes the time step before and the one reached, and returns a number for each
of the `E` environments. The bytes are those of the Atari Annotated RAM Interface
(Anand et al. 2019, https://arxiv.org/abs/1906.08226).
"""


def freeway_middle(before, after):
    """Freeway: 1 while the chicken (byte 14, 6 at the start) is half-way across."""
    height = after.ram[:, 14].astype(int)
    return (height > 60) & (height < 120)


def pong_high(before, after):
    """Pong: 1 while the player's paddle (byte 51, 38 to 203) is near the top."""
    return after.ram[:, 51] < 80


def pong_low(before, after):
    """Pong: 1 while the player's paddle (byte 51, 38 to 203) is near the bottom."""
    return after.ram[:, 51] > 160


def pacman_left(before, after):
    """Ms. Pac-Man: 1 while she (byte 10, 18 to 160) is in the left third."""
    return after.ram[:, 10] < 60


def breakout_left(before, after):
    """Breakout: 1 while the paddle (byte 72, 55 to 191) is in the left third."""
    return after.ram[:, 72] < 95
