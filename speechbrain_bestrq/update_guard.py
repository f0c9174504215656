"""Which updates are made: those whose gradients are finite, and not far larger than usual."""

from typing import Any

import torch
from torch import Tensor

#: Updates from which on the usual gradient norm is known, and how much of it stays from one to the next.
SPIKES_FROM, NORM_MEMORY = 100, 0.99


class UpdateGuard:
    """Judges updates by the norm of their gradients and counts those that are skipped, all on the device.

    Arguments
    ---------
    device : torch.device or str
        Where the gradients are.
    spike_ratio : float
        Updates whose norm is this many times the usual are skipped too, from update 101 on; 0 looks for none.

    Example
    -------
    >>> guard = UpdateGuard("cpu")
    >>> [bool(guard.judge(torch.tensor(norm), update)) for update, norm in enumerate((2.0, float("nan"), 3.0), 1)]
    [True, False, True]
    >>> int(guard.skipped_row), int(guard.longest_row), round(float(guard.usual_norm), 2)
    (0, 1, 2.01)
    """

    def __init__(self, device: torch.device | str, spike_ratio: float = 0.0):
        self.spike_ratio = spike_ratio
        self.usual_norm = torch.zeros((), device=device)
        """A running mean of the norms of updates that were made, a scalar; 0 before the first."""
        self.skipped_row, self.longest_row = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        """Updates skipped in a row: now, and the most since :meth:`start_row`; scalars."""

    def judge(self, norm: Tensor, update: int) -> Tensor:
        """Judge an update, and remember it.

        Arguments
        ---------
        norm : Tensor
            Of its gradients, a scalar.
        update : int
            Its number, from 1 on.

        Returns
        -------
        Tensor
            Boolean, a scalar: whether it is to be made.
        """
        good = norm.isfinite()
        if self.spike_ratio and update > SPIKES_FROM:
            good &= (norm <= self.spike_ratio * self.usual_norm) | (self.usual_norm == 0)
        memory = torch.where(self.usual_norm == 0, 0.0, NORM_MEMORY)  # none yet
        self.usual_norm = torch.where(good, memory * self.usual_norm + (1 - memory) * norm, self.usual_norm)
        self.skipped_row = torch.where(good, 0, self.skipped_row + 1)
        self.longest_row = torch.maximum(self.longest_row, self.skipped_row)
        return good

    def start_row(self) -> None:
        """Forget rows that are over."""
        self.longest_row = self.skipped_row

    def state(self) -> dict[str, Tensor]:
        """Give what :meth:`load` takes."""
        return {"skipped_row": self.skipped_row, "usual_norm": self.usual_norm}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state, which may hold other things too."""
        self.usual_norm, self.skipped_row = state["usual_norm"], state["skipped_row"]
        self.start_row()
