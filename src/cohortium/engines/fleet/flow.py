"""How many frames a site may send in a while. Who sends faster is read more slowly, and disturbs nobody else."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Flow:
    """A token bucket for each site.

    Attributes:
        per_second, burst: frames that a site may send over time, and at once. A round takes a handful, and a model of
            40 MB takes 80.
        clock: monotonic seconds.
    """

    per_second: float
    burst: int
    clock: Callable[[], float]
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, site: str, size: int) -> float:
        """Takes a frame of a site into account; returns how many seconds to wait before its next one is read."""
        now = self.clock()
        left, seen = self._buckets.get(site, (float(self.burst), now))
        left = min(float(self.burst), left + (now - seen) * self.per_second) - 1.0
        self._buckets[site] = left, now
        return max(0.0, -left / self.per_second)
