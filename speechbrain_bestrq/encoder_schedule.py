"""When a fine-tuned encoder is trained, and at what part of its rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from speechbrain_bestrq.errors import InputError


@dataclass(frozen=True)
class EncoderSchedule:
    """An encoder that rests while a new head finds its way, and then begins gently.

    Shares and no numbers of updates, which would be most of a run with few labels and nothing of a long one.

    Arguments
    ---------
    rest : float
        Share of all updates in which the encoder is not trained.
    warmup : float
        Share of all updates, after these, over which its rate rises to what it is to be.
    updates : int
        Of the run.

    Raises
    ------
    InputError
        If nothing is left at the full rate.

    Example
    -------
    >>> schedule = EncoderSchedule(rest=0.1, warmup=0.2, updates=50)
    >>> schedule.start, [round(schedule.share(update), 2) for update in (4, 5, 9, 14, 49)]
    (5, [0.0, 0.1, 0.5, 1.0, 1.0])
    """

    rest: float = 0.0
    warmup: float = 0.0
    updates: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rest < 1 and 0 <= self.warmup < 1 and self.rest + self.warmup < 1):
            raise InputError(
                f"encoder_rest and encoder_warmup are shares of all updates, together below 1, not {self.rest} and "
                f"{self.warmup}."
            )

    @property
    def start(self) -> int:
        """The first update that trains the encoder, from 0."""
        return int(self.rest * self.updates)

    def share(self, update: int) -> float:
        """Of its rate, with which the encoder is trained in an update.

        Arguments
        ---------
        update : int
            From 0.

        Returns
        -------
        float
            0 where it rests.
        """
        if update < self.start:
            return 0.0
        rising = int(self.warmup * self.updates)
        return min((update - self.start + 1) / rising, 1.0) if rising else 1.0

    @contextmanager
    def applied(self, optimizer: torch.optim.Optimizer | None, update: int) -> Iterator[None]:
        """Lower an optimiser's rates for an update; annealing and checkpoints know the full ones.

        Arguments
        ---------
        optimizer : torch.optim.Optimizer or None
            The encoder's; None if it has none.
        update : int
            From 0.

        Yields
        ------
        None
        """
        rates = [group["lr"] for group in optimizer.param_groups] if optimizer is not None else []
        for group, rate in zip(optimizer.param_groups if rates else (), rates, strict=True):
            group["lr"] = rate * self.share(update)
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups if rates else (), rates, strict=True):
                group["lr"] = rate
