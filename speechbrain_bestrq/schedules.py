"""Learning rates as functions of the update, without state: nothing to save, nothing to go out of step.

Updates count from 1 and the rate is set before the update it belongs to. (A schedule
that steps after the update makes the first one at the peak rate.)
"""

import math


class WarmupNoam:
    """Linear warm-up, then decay with the inverse square root (arXiv 1706.03762, equation 3, scaled to its peak).

    Arguments
    ---------
    peak : float
        Learning rate at the end of the warm-up.
    warmup_updates : int
        Length of the warm-up.

    Example
    -------
    >>> schedule = WarmupNoam(peak=8e-4, warmup_updates=100)
    >>> round(schedule(1), 9), schedule(100), schedule(400)
    (8e-06, 0.0008, 0.0004)
    """

    def __init__(self, peak: float, warmup_updates: int):
        self.peak, self.warmup_updates = peak, max(warmup_updates, 1)

    def __call__(self, update: int) -> float:
        """Learning rate of an update, counted from 1."""
        return self.peak * min(update / self.warmup_updates, math.sqrt(self.warmup_updates / update))


class WarmupLinear:
    """Linear warm-up, then a straight line to zero behind the last update (arXiv 2006.11477, section 4.2).

    Arguments
    ---------
    peak : float
        Learning rate at the end of the warm-up.
    warmup_updates : int
        Length of the warm-up.
    total_updates : int
        Updates of the whole run.

    Example
    -------
    >>> schedule = WarmupLinear(peak=1e-3, warmup_updates=10, total_updates=109)
    >>> schedule(1), schedule(10), schedule(60), round(schedule(109), 9)
    (0.0001, 0.001, 0.0005, 1e-05)
    """

    def __init__(self, peak: float, warmup_updates: int, total_updates: int):
        self.peak, self.warmup_updates = peak, max(warmup_updates, 1)
        self.total_updates = max(total_updates, self.warmup_updates)

    def __call__(self, update: int) -> float:
        """Learning rate of an update, counted from 1."""
        left = max(self.total_updates + 1 - update, 0) / (self.total_updates + 1 - self.warmup_updates)
        return self.peak * min(update / self.warmup_updates, left)


class WarmupCosine:
    """Linear warm-up, then half a cosine down to a share of the peak at the last update.

    Arguments
    ---------
    peak : float
        Learning rate at the end of the warm-up.
    warmup_updates : int
        Length of the warm-up.
    total_updates : int
        Updates of the whole run.
    final_share : float
        The rate of the last update as a share of the peak.

    Example
    -------
    >>> schedule = WarmupCosine(peak=1e-3, warmup_updates=10, total_updates=110, final_share=0.1)
    >>> schedule(1), schedule(10), round(schedule(60), 6), round(schedule(110), 6)
    (0.0001, 0.001, 0.00055, 0.0001)
    """

    def __init__(self, peak: float, warmup_updates: int, total_updates: int, final_share: float = 0.0):
        self.peak, self.warmup_updates = peak, max(warmup_updates, 1)
        self.total_updates, self.final_share = max(total_updates, self.warmup_updates + 1), final_share

    def __call__(self, update: int) -> float:
        """Learning rate of an update, counted from 1."""
        if update <= self.warmup_updates:
            return self.peak * update / self.warmup_updates
        progress = min((update - self.warmup_updates) / (self.total_updates - self.warmup_updates), 1.0)
        return self.peak * (self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + math.cos(math.pi * progress)))
