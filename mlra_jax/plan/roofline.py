"""How long a step takes at least: its work over what a chip can do."""

import dataclasses
from collections.abc import Iterable

from mlra_jax.plan.chips import Chip
from mlra_jax.plan.formula import Work
from mlra_jax.plan.program import Collective


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a step keeps each resource of a device busy, at its peak."""

    matrix: float
    memory: float
    links: float
    network: float

    @property
    def least(self) -> float:
        """Of the step, were all resources busy at the same time."""
        return max(self.matrix, self.memory, self.links, self.network)

    @property
    def most(self) -> float:
        """Were they busy one after the other."""
        return self.matrix + self.memory + self.links + self.network

    @property
    def bound(self) -> str:
        names = {
            "matrix": "matrix units",
            "memory": "memory",
            "links": "links",
            "network": "network",
        }
        return names[max(names, key=lambda name: getattr(self, name))]


def times(work: Work, collectives: Iterable[Collective], chip: Chip) -> Times:
    links = network = 0.0
    for c in collectives:
        if c.links:
            links += c.bytes / (chip.link * (c.links if chip.is_tpu else 1))
        else:
            network += c.bytes / chip.network
    return Times(work.flops / chip.flops, work.traffic / chip.memory_bandwidth, links, network)
