"""What steps: Atari games, mazes, and other rewards for them."""
