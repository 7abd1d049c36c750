"""What steps: Atari games, worlds on the device, and other rewards for them."""
