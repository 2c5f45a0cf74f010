"""What one device can do, by its vendor's pages. The one table of such numbers for plans.

Sources: cloud.google.com/tpu/docs/v5e, /v5p, /v6e (matrix rate, memory, bandwidth; the two-way
bandwidth of all links together is 400, 1200 and 800 GB/s over 4, 6 and 4 links; the data-center
network is 6.4 Tbit/s of a pod of 256 v5e, 50 Gbit/s a v5p and 25.6 Tbit/s of a pod of 256 v6e);
NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200, hosts of 8 with one network
card of 200 (A100) or 400 Gbit/s a GPU. All are peaks: nothing was measured for this table.
"""

import dataclasses

from mlra_jax.config import ConfigError
from mlra_jax.costs import PEAK_FLOPS


@dataclasses.dataclass(frozen=True)
class Chip:
    """A second's work of one device. Bandwidths in bytes per second."""

    kind: str
    """As the devices call themselves."""
    memory: int
    """Bytes."""
    memory_bandwidth: float
    link: float
    """Of one link, one way; of a GPU all its links, which meet in a switch."""
    network: float
    """Of one device's share of its host's network, one way: between slices, or hosts of GPUs."""
    is_tpu: bool = True

    @property
    def flops(self) -> float:
        """Dense bfloat16 products and sums."""
        return PEAK_FLOPS[self.kind]


CHIPS = {
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 50e9, 3.125e9),
    "v5p": Chip("TPU v5", 95 * 2**30, 2765e9, 100e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1600e9, 100e9, 12.5e9),
    "a100": Chip("NVIDIA A100", 80 * 10**9, 2039e9, 300e9, 25e9, is_tpu=False),
    "h100": Chip("NVIDIA H100", 80 * 10**9, 3350e9, 450e9, 50e9, is_tpu=False),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 4800e9, 450e9, 50e9, is_tpu=False),
    "b200": Chip("NVIDIA B200", 180 * 10**9, 7700e9, 900e9, 50e9, is_tpu=False),
}


def find(name: str) -> Chip:
    """The chip of this name; ConfigError for one that the table does not have."""
    if name not in CHIPS:
        raise ConfigError(f"--topology names {name!r}, which is none of {', '.join(CHIPS)}")
    return CHIPS[name]
