"""One file, one agent: its options, networks, policy, learner and metrics."""

from aps_jax.agents import aps, dqn, value
from aps_jax.agents.base import Entry

# The only table of agents' names.
AGENTS: dict[str, Entry] = {
    "aps": aps.APS,
    "visr": aps.VISR,
    "entropy": aps.ENTROPY,
    "dqn": dqn.DQN,
    "der": value.DER,
    "der_dopamine": value.DER_DOPAMINE,
    "drq": value.DRQ,
    "drq_eps": value.DRQ_EPS,
    "curl": value.CURL,
    "curl_clean": value.CURL_CLEAN,
    "spr": value.SPR,
    "sr_spr": value.SR_SPR,
}
