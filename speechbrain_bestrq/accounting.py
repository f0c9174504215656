"""What a run has cost and what it has learned: clock, codebook use, values read back late, log lines."""

import errno
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.writing import write_text

#: Dense bf16/fp16 rates of the vendors' datasheets, FLOP/s, by a part of the device's name.
DATASHEET_FLOPS = {
    "B200": 2250e12,
    "GH200": 990e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def datasheet_flops(device_name: str, precision: str) -> float | None:
    """Look up a device's dense matrix rate.

    Arguments
    ---------
    device_name : str
        As ``torch.cuda.get_device_name()`` gives it.
    precision : str
        "bf16" or "fp16"; float32 has no one rate (TF32 or not), nor has a CPU.

    Returns
    -------
    float or None
        FLOP/s; None if unknown: then a run logs its rate and no utilisation.

    Example
    -------
    >>> datasheet_flops("NVIDIA H200", "bf16"), datasheet_flops("cpu", "fp32")
    (989000000000000.0, None)
    """
    if precision not in ("bf16", "fp16"):
        return None
    # whole words: an RTX A1000 is no A100
    found = (flops for name, flops in DATASHEET_FLOPS.items() if re.search(rf"\b{name}\b", device_name))
    return next(found, None)


#: What is left of a single meeting with a code after some thousand updates of :class:`~speechbrain_bestrq.tally.Tally`.
FORGOTTEN = 0.005


def code_statistics(counts: Tensor) -> dict[str, Tensor]:
    """Summarise how labels are spread over a codebook.

    Arguments
    ---------
    counts : Tensor
        How often each code was the label, shape (num_codebooks, codebook_size); of a memory that fades, what is left
        of it, and a code is in use while that is more than :data:`FORGOTTEN`.

    Returns
    -------
    dict
        Means over the codebooks, as scalars: "unigram_entropy" (nats; the cross-entropy
        of the best guess that does not look at the audio), "code_perplexity",
        "codes_used", "commonest_share".

    Example
    -------
    >>> statistics = code_statistics(torch.tensor([[2.0, 2.0, 0.0, 0.0]]))
    >>> {name: round(float(value), 4) for name, value in statistics.items()}
    {'unigram_entropy': 0.6931, 'code_perplexity': 2.0, 'codes_used': 2.0, 'commonest_share': 0.5}
    """
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1).double()
    entropy = -torch.special.xlogy(shares, shares).sum(1)
    return {
        "unigram_entropy": entropy.mean(),
        "code_perplexity": entropy.exp().mean(),
        "codes_used": (counts > FORGOTTEN).double().sum(1).mean(),
        "commonest_share": shares.max(1).values.mean(),
    }


class LateReader:
    """Reads device values back without making the device or the host wait.

    Example
    -------
    >>> reader = LateReader()
    >>> reader.submit({"step": 1}, {"loss": torch.tensor(2.0)})
    >>> list(reader.ready())
    [{'step': 1, 'loss': 2.0}]
    """

    def __init__(self):
        self._pending: deque[tuple[dict[str, Any], list[str], Tensor, torch.cuda.Event | None]] = deque()

    def submit(self, known: dict[str, Any], values: dict[str, Tensor]) -> None:
        """Start copying scalars to the host.

        Arguments
        ---------
        known : dict
            What the host knows already; returned with the values.
        values : dict of Tensor
            Scalars on one device.
        """
        stacked = torch.stack([value.double() for value in values.values()])
        event = None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            stacked = host
        self._pending.append((known, list(values), stacked, event))

    def ready(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """Yield, in order, what has arrived.

        Arguments
        ---------
        wait : bool
            Wait for all that is under way.

        Yields
        ------
        dict
            What was known and the values, as floats.
        """
        while self._pending:
            known, names, host, event = self._pending[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._pending.popleft()
            yield {**known, **dict(zip(names, host.tolist(), strict=True))}


class StepClock:
    """Tells where the seconds of training go, since the last log line or since a stage began.

    Arguments
    ---------
    device : torch.device or str
        That trains.

    Attributes
    ----------
    wait, saving_seconds : float
        Seconds of waiting for audio, and of saving, which are not counted in :attr:`seconds`; the latter since it
        was last set to 0.
    flops : float
        To be added to: of the model's operations.
    updates : int
        To be added to.

    Example
    -------
    >>> clock = StepClock("cpu")
    >>> clock.updates += 1
    >>> with clock.saving():
    ...     time.sleep(0.2)
    >>> clock.updates, clock.saving_seconds >= 0.2, clock.seconds < clock.saving_seconds
    (1, True, True)
    """

    def __init__(self, device: torch.device | str):
        self.device, self.saving_seconds = torch.device(device), 0.0
        self.start()

    def start(self) -> None:
        """Begin anew; what saving took is kept for the next log line."""
        self._started = self._asked = time.perf_counter()
        self.wait, self.flops, self.updates = 0.0, 0.0, 0

    @property
    def seconds(self) -> float:
        """Since the start, without saving."""
        return time.perf_counter() - self._started

    def ask_for_batch(self) -> None:
        """From here on the host waits for audio."""
        self._asked = time.perf_counter()

    def batch_came(self) -> None:
        """The waiting is over."""
        self.wait += time.perf_counter() - self._asked

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count what saving takes by itself: it is neither training nor waiting for audio."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # saving would wait for the updates that are still under way
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.saving_seconds += seconds
            self._started += seconds
            self._asked += seconds


class JsonLines:
    """A log of one JSON object a line.

    Arguments
    ---------
    path : str or Path
        The file; appended to.

    Example
    -------
    >>> import tempfile
    >>> log = JsonLines(Path(tempfile.mkdtemp()) / "log.jsonl")
    >>> log.append({"step": 1, "loss": 2.5}); log.append({"step": 2, "loss": float("nan")})
    >>> log.read()
    [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': None}]
    >>> log.truncate(after_step=1); log.read()
    [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line, or nothing; what is not finite becomes null (JSON has no NaN)."""
        finite = {
            key: None if isinstance(value, float) and not abs(value) < float("inf") else value
            for key, value in entry.items()
        }
        line = (json.dumps(finite, allow_nan=False) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(whole)  # no part of a line stays
                raise

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines; a last line cut short by a kill is left out.

        Raises
        ------
        InputError
            If a line is no JSON.
        """
        if not self.path.exists():
            return []
        entries = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"'{self.path}' line {number} is not JSON ({error}): delete that line.") from error
        return entries

    def truncate(self, after_step: int, validation_comes: bool = False) -> None:
        """Drop what a resumed run is going to log again: entries after a step, and the validation of that step."""
        if not self.path.exists():
            return
        # the validation of a step comes after all else of it
        last = (after_step, not validation_comes)
        kept = [entry for entry in self.read() if (entry["step"], entry.get("event") == "valid") <= last]
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


def format_line(entry: dict[str, Any]) -> str:
    """Put a log entry into one line of text.

    Arguments
    ---------
    entry : dict
        Names and values; None is left out.

    Returns
    -------
    str

    Example
    -------
    >>> format_line({"event": "train", "step": 100, "loss": 6.54321, "utilisation": None, "learning_rate": 8e-06})
    'train | step 100 | loss 6.543 | learning_rate 8e-06'
    """

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    parts = [f"{name} {text(value)}" for name, value in entry.items() if name != "event" and value is not None]
    return " | ".join([str(entry.get("event", "log")), *parts])
