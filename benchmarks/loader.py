"""How fast batches of a pre-training are made ready, without any training: from audio files, and decoded before.

    python benchmarks/loader.py /path/to/audio
    python benchmarks/loader.py /path/to/LibriSpeech --workers 4 --hours 2

All in turns, on the same files, in this process:

    bare decoding    soundfile reads each file whole, into 16-bit samples; nothing else is done
    files            the loader of the recipe: planned, cut, decoded, put together, masks and seeds drawn
    cache            the same with cache: memory, from decoded samples that are mapped into memory

Figures are seconds of audio for each second of processor time; medians over the blocks with the range. With
--workers also what reaches the main process from so many loading processes, for each second that passes. Files
are read once before, so that a slow disk does not count.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.batching import LadderBatchSampler
from speechbrain_bestrq.machine import describe_machine
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.pcm_cache import cache_audio
from speechbrain_bestrq.pretraining_data import WaveformDataset, make_loader

RATE = 16000
SUFFIXES = {".flac", ".wav", ".ogg", ".opus", ".mp3"}


def find_audio(folder: Path, hours: float) -> AudioTable:
    """The first files of a folder, of one second at least and a minute at most."""
    paths, seconds = [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        info = soundfile.info(path)
        if 1.0 <= info.duration <= 60.0:
            paths.append(str(path))
            seconds.append(info.frames / info.samplerate)
        if sum(seconds) >= 3600 * hours:
            break
    return AudioTable(paths, paths, seconds, RATE)


def decode(table: AudioTable) -> float:
    """Read every file and give the seconds that were in them."""
    for index in range(len(table)):
        soundfile.read(table.path(index), dtype="int16")
    return 3600 * table.hours


def load(loader: torch.utils.data.DataLoader, epochs: itertools.count) -> float:
    """Make the batches of an epoch and give the seconds that are in them."""
    loader.batch_sampler.set_epoch(next(epochs))
    return sum(batch.seconds for batch in loader)


def measure(ways: dict[str, Callable[[], float]], blocks: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Audio-seconds a second of each way, block by block, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks + 1):
        for name, way in ways.items():
            started = clock()
            seconds = way()
            if block:  # the first reads the files in
                rates[name].append(seconds / (clock() - started))
    return rates


def rows(rates: dict[str, list[float]], base: str) -> list[str]:
    """A line of the table for each way."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return [
        f"| {name} | {medians[name]:,.0f} ({min(values):,.0f} - {max(values):,.0f}) "
        f"| {medians[name] / medians[base]:.2f} |"
        for name, values in rates.items()
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="audio")
    parser.add_argument("--hours", type=float, default=1.0, help="how much of it to take")
    parser.add_argument("--batch_seconds", type=float, default=100.0, help="max_batch_seconds of the recipe")
    parser.add_argument("--blocks", type=int, default=5, help="times that each way is measured")
    parser.add_argument("--workers", type=int, default=0, help="loading processes to measure too")
    arguments = parser.parse_args(words)
    table = find_audio(arguments.folder, arguments.hours)
    if not len(table):
        parser.error(f"{arguments.folder} holds no audio of 1 to 60 s ({', '.join(sorted(SUFFIXES))})")
    torch.set_num_threads(1)
    masking = SpanMasking(0.205, 4)
    with tempfile.TemporaryDirectory() as folder:
        caches = {"files": None, "cache": cache_audio(table, folder)}
        loaders = {}
        for workers in {0, arguments.workers}:
            for name, cache in caches.items():
                sampler = LadderBatchSampler(table.lengths, round(arguments.batch_seconds * RATE))
                dataset = WaveformDataset(table, masking, lambda samples: (1 + samples // 160) // 4, cache=cache)
                loaders[name, workers] = make_loader(dataset, sampler, workers)
        epochs = itertools.count(1)

        def ways(workers: int) -> dict[str, Callable[[], float]]:
            return {name: lambda name=name: load(loaders[name, workers], epochs) for name in caches}

        print(f"{table.hours:.2f} hours in {len(table)} files, mean {np.mean(table.lengths) / RATE:.1f} s; batches of")
        print(f"{arguments.batch_seconds:g} s; {arguments.blocks} blocks in turns; {describe_machine()}\n")
        print("| one process | audio-s per processor-second (range) | of bare decoding |\n|---|---|---|")
        alone = measure({"bare decoding": lambda: decode(table)} | ways(0), arguments.blocks, time.process_time)
        print("\n".join(rows(alone, "bare decoding")))
        if arguments.workers:
            print(f"\n| {arguments.workers} workers | audio-s per second (range) | of files |\n|---|---|---|")
            together = measure(ways(arguments.workers), arguments.blocks, time.perf_counter)
            print("\n".join(rows(together, "files")))


if __name__ == "__main__":
    main()
