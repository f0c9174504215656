"""What it is worth, on a CPU, to keep memory that tensors gave back (speechbrain_bestrq.allocator).

    python benchmarks/freed_memory.py
    python benchmarks/freed_memory.py --yamls wav2vec2_small --rounds 40

Two processes for each YAML, one as the C library does by itself and one that keeps, take updates of the same model on
the same noise, in turns, so that whatever else the machine does falls on both alike. Both lie in memory all the time,
and only one of them works. Pages: those that the system mapped and cleared in an update, of 4 KiB as a rule.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RATE
from contenders import Ours

from speechbrain_bestrq.allocator import keep_freed_memory
from speechbrain_bestrq.machine import describe_machine

BY_ITSELF, KEPT = "returned", "kept"


def work(name: str, way: str, utterances: int, seconds: float) -> None:
    """Take an update for each line of the standard input, and tell its seconds and pages."""
    if way == KEPT and not keep_freed_memory():
        raise SystemExit("this C library cannot be told, or the environment has settings for its allocator.")
    waves = 0.1 * torch.randn(utterances, round(seconds * RATE), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        contender = Ours(name, "cpu", "fp32", Path(folder))
        contender.start([waves])
        for _ in range(3):
            contender.step(0)
        print("ready", flush=True)
        for _ in sys.stdin:
            pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            contender.step(0)
            took = time.perf_counter() - start
            print(json.dumps([took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages]), flush=True)


class Worker:
    """A process that takes updates when it is told to."""

    def __init__(self, name: str, way: str, utterances: int, seconds: float):
        words = [sys.executable, __file__, "--work", way, "--yamls", name]
        words += ["--utterances", str(utterances), "--seconds", str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # what it says on the way to "ready" is of no interest, and an error comes on the standard error
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
        self.process = subprocess.Popen(words, env=plain, **pipes)
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"{name}, {way}: the process ended.")
        self.seconds: list[float] = []
        self.pages: list[int] = []

    def update(self) -> None:
        """Take one, and note what it took."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, pages = json.loads(self.process.stdout.readline())
        self.seconds.append(seconds)
        self.pages.append(pages)


def row(name: str, arguments: argparse.Namespace) -> str:
    """Measure a YAML, and put it into a row."""
    workers = [Worker(name, way, arguments.utterances, arguments.seconds) for way in (BY_ITSELF, KEPT)]
    try:
        for number in range(arguments.rounds):
            for worker in workers if number % 2 else reversed(workers):
                worker.update()
    finally:
        for worker in workers:
            worker.process.stdin.close()
            worker.process.wait()
    audio = arguments.utterances * arguments.seconds
    speeds = [audio / statistics.median(worker.seconds) for worker in workers]
    ratios = [theirs / ours for theirs, ours in zip(workers[0].seconds, workers[1].seconds, strict=True)]
    first, middle, third = statistics.quantiles(ratios, n=4)
    pages = [statistics.median(worker.pages) for worker in workers]
    return (
        f"| {name} | {speeds[0]:.1f} | {speeds[1]:.1f} | {middle:.2f} ({first:.2f} - {third:.2f}) | {pages[0]:.0f} | "
        f"{pages[1]:.0f} |"
    )


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    yamls = ["bestrq_small", "wav2vec2_small"]
    parser.add_argument("--yamls", nargs="+", default=yamls, help="of the recipe for pre-training (the small ones)")
    parser.add_argument("--rounds", type=int, default=16, help="updates of each (%(default)s)")
    parser.add_argument("--utterances", type=int, default=5, help="in an update (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of an utterance (%(default)s)")
    parser.add_argument("--work", choices=(BY_ITSELF, KEPT), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.rounds < 2 or arguments.utterances < 1 or arguments.seconds < 1.0:
        parser.error("give at least two rounds, one utterance, and one second.")
    if arguments.work:
        work(arguments.yamls[0], arguments.work, arguments.utterances, arguments.seconds)
        return
    print(
        f"{arguments.utterances} x {arguments.seconds:g} s an update, fp32, {arguments.rounds} updates of each in "
        f"turns; {describe_machine()}\n\n"
        "| YAML | by itself, audio-s/s | kept | times the speed (quartiles of turns) | pages an update | kept |\n"
        "|---|---|---|---|---|---|"
    )
    for name in arguments.yamls:
        print(row(name, arguments), flush=True)


if __name__ == "__main__":
    main()
