"""Sums the metrics of updates on the device, so that only a row waits for it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aps_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named(Mapping[str, Array]):
    """A vector whose entries have names: a GPU computes it in one kernel."""

    vector: Array  # [..., M]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, name: str) -> Array:
        return self.vector[..., self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class FirstBad(NamedTuple):
    """The first update whose metrics were not all finite, if there was one."""

    update: jax.Array  # [] int32, its number in the stage; -1 while all are finite.
    names: Named  # [M] bool, whether that metric was not finite.
    extras: dict[str, jax.Array]  # what else the caller wants to know of that update.


class RunningSums(NamedTuple):
    """Sums of metrics on the device, read and emptied when a row is written."""

    totals: Named  # [M] float32
    num_updates: jax.Array  # [] int32, updates summed.
    bad: FirstBad


def init_sums(names: Sequence[str], extras: Mapping[str, Array]) -> RunningSums:
    """Returns sums of nothing.

    Args:
      names: Of the metrics.
      extras: Arrays of the shapes and types that `add_to_sums` is given under these
        names.
    """
    return RunningSums(
        totals=Named(jnp.zeros(len(names), jnp.float32), tuple(names)),
        num_updates=jnp.zeros((), jnp.int32),
        bad=FirstBad(
            update=jnp.full((), -1, jnp.int32),
            names=Named(jnp.zeros(len(names), bool), tuple(names)),
            extras={name: jnp.zeros_like(value) for name, value in extras.items()},
        ),
    )


def add_to_sums(
    running: RunningSums,
    values: Mapping[str, jax.Array],
    *,
    update: jax.Array,
    extras: Mapping[str, jax.Array],
) -> RunningSums:
    """Adds the metrics of one update.

    Args:
      running: The sums so far.
      values: Each `[]` float.
      update: `[]` int32, the update's number in the stage.
      extras: Remembered of the first update that is not finite.

    Raises:
      ValueError: `values` has other names than the sums.
    """
    if set(values) != set(running.totals):
        raise ValueError(
            f"Expected metrics {sorted(running.totals)}, got {sorted(values)}."
        )
    names = running.totals.names
    new = jnp.stack([values[name] for name in names])
    is_bad = ~jnp.isfinite(new)
    here = FirstBad(update, Named(is_bad, names), dict(extras))
    is_first = jnp.any(is_bad) & (running.bad.update < 0)
    return RunningSums(
        totals=Named(running.totals.vector + new, names),
        num_updates=running.num_updates + 1,
        bad=jax.tree.map(lambda x, y: jnp.where(is_first, x, y), here, running.bad),
    )


def means(running: RunningSums) -> dict[str, float]:
    """Returns the mean of each metric on the host; NaN where nothing was summed."""
    totals, num_updates = jax.device_get((running.totals, running.num_updates))
    return {
        name: float(total) / int(num_updates) if num_updates else math.nan
        for name, total in totals.items()
    }
