"""One file, one agent: its networks, policy, learner and metrics."""
