"""When a fine-tuned encoder is trained, and at what part of its rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from speechbrain_bestrq.errors import InputError

#: What a share of a run may be off by rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class EncoderSchedule:
    """An encoder that rests while a new head finds its way, and then begins gently.

    Shares and no numbers of updates: these would be most of a run with few labels and nothing of a long one, and on
    another number of devices an epoch has others.

    Arguments
    ---------
    rest : float
        Share of the run in which the encoder is not trained.
    warmup : float
        Share of the run, after that, over which its rate rises to what it is to be.

    Raises
    ------
    InputError
        If nothing is left at the full rate.

    Example
    -------
    >>> schedule = EncoderSchedule(rest=0.1, warmup=0.2)
    >>> [round(schedule.share(update / 50, 1 / 50), 2) for update in (4, 5, 9, 14, 49)]
    [0.0, 0.1, 0.5, 1.0, 1.0]
    """

    rest: float = 0.0
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.rest < 1 and 0 <= self.warmup < 1 and self.rest + self.warmup < 1):
            raise InputError(
                f"encoder_rest and encoder_warmup are shares of all updates, together below 1, not {self.rest} and "
                f"{self.warmup}."
            )

    def share(self, done: float, one: float) -> float:
        """Of its rate, with which the encoder is trained in an update.

        Arguments
        ---------
        done : float
            Share of the run that is over before the update.
        one : float
            That of an update.

        Returns
        -------
        float
            0 where it rests.
        """
        trained = done - self.rest
        if trained < -ROUNDING:
            return 0.0
        return min((trained + one) / self.warmup, 1.0) if self.warmup else 1.0


@contextmanager
def lowered(optimizer: torch.optim.Optimizer | None, share: float) -> Iterator[None]:
    """Lower an optimiser's rates for an update; annealing and checkpoints know the full ones.

    Arguments
    ---------
    optimizer : torch.optim.Optimizer or None
        None has no rates.
    share : float
        Of its rates.

    Yields
    ------
    None

    Example
    -------
    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> with lowered(optimizer, 0.1):
    ...     print(optimizer.param_groups[0]["lr"])
    0.05
    >>> optimizer.param_groups[0]["lr"]
    0.5
    """
    groups = [] if optimizer is None else optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * share
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
