"""Compares agents that are published with their published scores, seed for seed.

An agent whose mean lies outside of what as many seeds of the published runs give has a
fault until it is explained: docs/value_agents.md.
"""

import math
from collections.abc import Sequence

import numpy as np

from aps_jax.report import aggregates, finished_runs
from aps_jax.scores import protocol, scores

TITLE = "Known agents beside their published scores"
NOTE = (
    "95 % range: of the mean of as many seeds of the published runs, their mean +- "
    "1.96 standard deviations / sqrt(seeds). Without one, only the mean is published."
)
# Agents of this project by the published system that they are.
_SYSTEMS = {
    "der": "DER",
    "der_dopamine": "DER_rliable100",
    "drq": "DrQ_rliable100",
    "drq_eps": "DrQ_eps_rliable100",
    "curl": "CURL_rliable100_final",
    "spr": "SPR_rliable100",
    "sr_spr": "SR-SPR",
}
_AGENT_STEPS = 100_000


def rows(methods: Sequence[aggregates.Method]) -> list[dict[str, str]]:
    """Returns a row for each game that an agent learned as it was published.

    That is 100,000 agent steps of reward alone, and the standard evaluation.
    """
    found = []
    for method in methods:
        system = _SYSTEMS.get(method.agent)
        is_as_published = (
            method.arm == finished_runs.SCRATCH
            and method.settings.get("finetune_agent_steps") == _AGENT_STEPS
            and not protocol.differences(method.protocol)
        )
        if system is None or not is_as_published:
            continue
        for game, runs in method.runs.items():
            cell = scores.published_scores()[system].get(game)
            if cell is None:
                continue
            mean = float(np.mean([run.returns.mean() for run in runs]))
            interval = verdict = "-"
            if not math.isnan(cell.deviation):
                half = 1.96 * cell.deviation / len(runs) ** 0.5
                low, high = cell.score - half, cell.score + half
                interval = f"{low:,.1f} to {high:,.1f}"
                verdict = "inside" if low <= mean <= high else "outside"
            found.append(
                {
                    "agent": method.label,
                    "game": scores.camel_case(game),
                    "seeds": str(len(runs)),
                    "mean": f"{mean:,.1f}",
                    "published": f"{cell.score:,.1f}",
                    "system": system,
                    "95 % range": interval,
                    "": verdict,
                }
            )
    return found
