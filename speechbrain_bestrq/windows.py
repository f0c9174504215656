"""Stretches of audio that are encoded at once, and batches of them.

A file of up to :data:`WINDOW_SECONDS` is encoded whole. A longer one is encoded in windows of
that length which overlap by twice :data:`CONTEXT_SECONDS`, and each frame is taken from the
window in which it is at least that far from an inner edge: so memory is bounded, however long
a file is, at the price that attention reaches no further than the window (nor do the statistics
of a front end that normalises each utterance).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from speechbrain_bestrq.encoder import SpeechEncoder

#: Longer files are encoded in windows of this length.
WINDOW_SECONDS = 60

#: What a window has beyond the frames that are taken from it, on each side where the file goes on.
CONTEXT_SECONDS = 5


class Window(NamedTuple):
    """A stretch of a file that is encoded at once."""

    file: int
    """Index of the file."""
    start: int
    """First sample."""
    samples: int
    """Samples that are read."""
    skipped: int
    """Frames of context before the frames that are kept."""
    first: int
    """Place in the file of the first frame that is kept."""
    frames: int
    """Frames that are kept."""


def plan_windows(file: int, samples: int, frames: int, frame_samples: int, rate: int) -> Iterator[Window]:
    """Cut a file into windows.

    Arguments
    ---------
    file : int
        Its index.
    samples, frames : int
        Its length in samples and in encoder frames.
    frame_samples : int
        Samples from one frame to the next.
    rate : int
        Samples per second.

    Yields
    ------
    Window
        In order; their kept frames are those of the file, each once.

    Example
    -------
    >>> [(window.start, window.first, window.frames) for window in plan_windows(0, 70 * 16000, 1750, 640, 16000)]
    [(0, 0, 1375), (800000, 1375, 375)]
    """
    long, context = (seconds * rate // frame_samples for seconds in (WINDOW_SECONDS, CONTEXT_SECONDS))
    if frames <= long:
        yield Window(file, 0, samples, 0, 0, frames)
        return
    begin = 0
    while True:
        last = begin + long >= frames
        first = begin + context if begin else 0
        end = frames if last else begin + long - context
        start = begin * frame_samples
        yield Window(file, start, samples - start if last else long * frame_samples, first - begin, first, end - first)
        if last:
            return
        begin += long - 2 * context


def plan_batches(windows: Iterable[Window], most_samples: int) -> Iterator[list[Window]]:
    """Fill batches with windows in their order, so that none holds more than so many samples, padding included.

    Arguments
    ---------
    windows : iterable of Window
        Of similar lengths where they follow each other, or much will be padded.
    most_samples : int
        A single window may be longer.

    Yields
    ------
    list of Window

    Example
    -------
    >>> windows = [Window(index, 0, samples, 0, 0, 1) for index, samples in enumerate((50, 40, 20, 10))]
    >>> [[window.samples for window in batch] for batch in plan_batches(windows, 100)]
    [[50, 40], [20, 10]]
    """
    batch, longest = [], 0
    for window in windows:
        longest = max(longest, window.samples)
        if batch and longest * (len(batch) + 1) > most_samples:
            yield batch
            batch, longest = [], window.samples
        batch.append(window)
    if batch:
        yield batch


def samples_per_frame(speech_encoder: SpeechEncoder) -> int:
    """Count the samples from one encoder frame to the next, whatever the front end is.

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        The encoder.

    Returns
    -------
    int
        Exact, for an encoder's frames are a whole number of samples apart; 0 if it has no frame in a day of speech.
    """
    samples = 10**15  # so long that the frames which an encoder has more or less at the ends do not matter
    frames = speech_encoder.num_frames(samples)
    return round(samples / frames) if frames else 0
