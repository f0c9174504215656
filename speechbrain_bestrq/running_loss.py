"""The mean loss of an epoch, read back late, and what is done when losses are not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speechbrain_bestrq.accounting import LateReader
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ranks import rank_and_size


class RunningLoss:
    """Adds up the losses of an epoch's batches where they are, without waiting for the device.

    Arguments
    ---------
    epoch : int
        For messages.
    patience : int
        Batches whose loss may be not finite.
    device : torch.device or str
    sums : sequence of float, optional
        What :meth:`state` gave, of an epoch that was broken off.

    Attributes
    ----------
    mean : Tensor
        Of the finite losses, as far as they have been read, on the host; 0 before.

    Example
    -------
    >>> losses = RunningLoss(1, 3, "cpu")
    >>> for loss in (1.0, 2.0, float("nan")):
    ...     losses.add(torch.tensor(loss))
    >>> losses.read()
    >>> float(losses.mean), losses.state()
    (1.5, [3.0, 2.0, 1.0])
    """

    def __init__(
        self, epoch: int, patience: int, device: torch.device | str | None, sums: Sequence[float] | None = None
    ):
        self.epoch, self.patience, self.mean = epoch, patience, torch.zeros(())
        # sum, batches with a finite loss, others
        self._sums = torch.tensor(sums or [0.0] * 3, dtype=torch.float64, device=device)
        self._reader = LateReader()

    def add(self, loss: Tensor) -> None:
        """Add the loss of a batch."""
        finite = loss.isfinite()
        self._sums += torch.stack([torch.where(finite, loss, 0.0), finite, ~finite]).double()

    def read_late(self) -> None:
        """Take what has arrived of what was asked for the time before, and ask for the present.

        Raises
        ------
        InputError
            If more losses than the patience were not finite.
        """
        self._take(wait=False)
        self._reader.submit({}, self._values())

    def read(self) -> None:
        """Read all, before a checkpoint takes the place of another; a collective of all ranks.

        Raises
        ------
        InputError
            On all ranks, if on one more losses than the patience were not finite, or none was.
        """
        counts = self._sums[1:].clone()
        if rank_and_size()[1] > 1:  # all give up, or none
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
        self._reader.submit({}, {**self._values(), "finite": counts[0], "not_finite": counts[1]})
        self._take(wait=True)

    def state(self) -> list[float]:
        """Give what the epoch goes on from."""
        return self._sums.tolist()

    def _values(self) -> dict[str, Tensor]:
        total, finite, others = self._sums.unbind()
        return {"loss": total / finite, "not_finite": others.clone()}

    def _take(self, wait: bool) -> None:
        for entry in self._reader.ready(wait):
            self.mean = torch.tensor(entry["loss"])
            if entry["not_finite"] > self.patience:
                raise InputError(
                    f"the loss of {entry['not_finite']:.0f} batches of epoch {self.epoch} was not finite: lower the "
                    "learning rates, or train in fp32, and begin anew."
                )
            if entry["not_finite"] and entry.get("finite") == 0:
                raise InputError(
                    f"the loss of no batch of epoch {self.epoch} was finite: lower the learning rates, or train in "
                    "fp32, and begin anew."
                )
