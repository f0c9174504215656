"""What a pre-training has heard, skipped and cost, in all and since its last log line."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from speechbrain_bestrq.accounting import LateReader, StepClock
from speechbrain_bestrq.tally import Tally


class TrainingAccount:
    """Keeps the figures of a run where they arise, and reads them back late: nothing makes the host wait.

    Arguments
    ---------
    tally : Tally
        Of the batches of an update.
    world_size : int
        Devices.
    device : torch.device or str

    Attributes
    ----------
    clock : StepClock
        Since the last log line, or since a stage began.
    totals : Tensor
        Seconds of audio and skipped updates since the first update, float64, on the device.
    gradient_norm : Tensor
        Of the last update, before clipping.
    """

    def __init__(self, tally: Tally, world_size: int, device: torch.device | str):
        self.tally, self.world_size = tally, world_size
        self.clock, self.reader = StepClock(device), LateReader()
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.window_sums = tally.zeros()
        self.gradient_norm = torch.zeros((), device=device)
        self._seconds_before = self._seconds_rewound = 0.0
        self.begin()
        self.start_clock()

    def begin(self) -> None:
        """From here on the devices are held."""
        self._begun = time.perf_counter()

    def start_clock(self) -> None:
        """Start measuring speed, since the last log line or since a stage began."""
        self.clock.start()
        self._clocked_seconds = self.totals[0].clone()

    @property
    def device_hours(self) -> float:
        """Hours that all devices have been held since the first update, whether they computed or waited.

        Not what came before, nor updates that a kill undid.
        """
        return (self._seconds_before + (time.perf_counter() - self._begun) * self.world_size) / 3600

    @property
    def audio_hours(self) -> float:
        """Hours of audio heard since the first update; waits for the device."""
        return float(self.totals[0]) / 3600

    def add_update(self, sums: Tensor, good: Tensor, norm: Tensor) -> None:
        """Add an update.

        Arguments
        ---------
        sums : Tensor
            Of its batches, as :attr:`Tally.sums`, of all ranks.
        good : Tensor
            Whether it was made, a scalar.
        norm : Tensor
            Of its gradients.
        """
        self.window_sums += torch.where(good, sums, 0.0)
        # audio is in the tally's fifth sum
        self.totals += torch.stack([sums[4], (~good).double()])
        self.gradient_norm = norm

    def submit(self, known: dict[str, Any], updates_left: int, peak: float | None, counts: dict[str, Tensor]) -> None:
        """Start reading back what has happened since the last line; a collective of all ranks.

        Arguments
        ---------
        known : dict
            What the line has besides.
        updates_left : int
            To the end of the run.
        peak : float, optional
            Operations a second that the device could do.
        counts : dict of Tensor
            More scalars to read.
        """
        seconds, clock = self.clock.seconds, self.clock
        flops = clock.flops / seconds
        known = {
            **known,
            "window_seconds": seconds,
            "device_hours": self.device_hours,
            "gflops_per_second": flops / 1e9,
            "utilisation": None if peak is None else flops / peak,
            "data_wait_share": clock.wait / seconds,
            "saving_seconds": clock.saving_seconds,
            "eta_hours": updates_left * seconds / clock.updates / 3600,
        }
        values = {
            **self.tally.averages(self.window_sums, self.world_size),
            "gradient_norm": self.gradient_norm,
            "audio_seconds": self.totals[0] - self._clocked_seconds,
            "audio_hours": self.totals[0] / 3600,
            "skipped_updates": self.totals[1],
        }
        self.reader.submit(known, values | counts)
        self.window_sums, clock.saving_seconds = self.tally.zeros(), 0.0
        self.start_clock()

    def ready(self, wait: bool) -> Iterator[dict[str, Any]]:
        """Yield what was submitted and has arrived.

        Arguments
        ---------
        wait : bool
            For all of it.

        Yields
        ------
        dict
            With "audio_seconds_per_second" in the place of its parts.
        """
        for entry in self.reader.ready(wait):
            entry["audio_seconds_per_second"] = entry.pop("audio_seconds") / entry.pop("window_seconds")
            entry["skipped_updates"] = int(entry["skipped_updates"])
            yield entry

    def go_back(self) -> None:
        """Forget what is under way, for the run goes back to its last checkpoint; what it has cost counts on."""
        self.reader = LateReader()
        self._seconds_rewound = self.device_hours * 3600
        self.tally.sums = self.tally.zeros()

    def state(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        seconds = self.device_hours * 3600
        return {"totals": self.totals, "window_sums": self.window_sums, "device_seconds": seconds}

    def load(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state` gave."""
        self.totals, self.window_sums = state["totals"], state["window_sums"]
        self._seconds_before = max(self._seconds_rewound, state["device_seconds"])
