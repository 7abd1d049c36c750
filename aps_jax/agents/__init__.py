"""One file, one agent: its options, networks, policy, learner and metrics."""

from aps_jax.agents import aps, dqn
from aps_jax.agents.base import Entry

# The only table of agents' names.
AGENTS: dict[str, Entry] = {
    "aps": aps.APS,
    "visr": aps.VISR,
    "entropy": aps.ENTROPY,
    "dqn": dqn.DQN,
}
