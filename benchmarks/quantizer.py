"""Speed and memory of the random-projection quantizer, against SpeechBrain's.

    python benchmarks/quantizer.py
    python benchmarks/quantizer.py --device cuda

Both label the same frames with the same projection and codebook. Their runs alternate, so
that whatever else the machine does falls on both alike. Extra memory is the peak of one
call over what was held before it, each in a fresh process. One Markdown table goes to the
standard output; nothing is written unless --output names a file.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from speechbrain.nnet.quantisers import RandomProjectionQuantizer as SpeechBrainQuantizer
from torch import Tensor

from speechbrain_bestrq.machine import describe_machine
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

#: What the project promises at 1200 frames and 8192 codes.
TARGET_RATIO, TARGET_MEGABYTES = 20.0, 50.0
#: Four stacked frames of 80 features; size of a code.
INPUT_DIM, CODEBOOK_DIM = 320, 16
OURS, THEIRS = "speechbrain_bestrq", "SpeechBrain"


def build(name: str, codes: int, device: str) -> Callable[[Tensor], Tensor]:
    """Build one of the two quantizers; both have the same projection and codebook."""
    ours = RandomProjectionQuantizer(INPUT_DIM, CODEBOOK_DIM, codes)
    if name == OURS:
        ours.to(device)
        return lambda x: ours(x)[..., 0]
    theirs = SpeechBrainQuantizer(INPUT_DIM, CODEBOOK_DIM, codes)
    theirs.P.copy_(ours.projection[0])
    theirs.CB.copy_(ours.codebooks[0])
    return theirs.to(device)


def random_frames(frames: int, device: str) -> Tensor:
    """Draw the input, shape (1, frames, INPUT_DIM)."""
    return torch.randn(1, frames, INPUT_DIM, generator=torch.Generator().manual_seed(0)).to(device)


def resident_megabytes(field: str) -> float:
    """Read a field of /proc/self/status that is given in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


@torch.no_grad()
def extra_megabytes(name: str, frames: int, codes: int, device: str) -> float:
    """Peak memory of one call over what was held before; to be run in a fresh process."""
    quantizer, x = build(name, codes, device), random_frames(frames, device)
    quantizer(x[:, :2])  # loads libraries and makes work spaces that are no quantizer's own
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        quantizer(x)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far (of importing) is forgotten
    except OSError:
        # not on Linux, or not allowed: the peak so far hides what stays under it; kB on Linux, bytes on macOS
        unit = 2**20 if sys.platform == "darwin" else 2**10
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantizer(x)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
    before = resident_megabytes("VmRSS")
    quantizer(x)
    return resident_megabytes("VmHWM") - before


def measure_memory(name: str, frames: int, codes: int, device: str) -> float:
    """Run :func:`extra_megabytes` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(extra_megabytes, (name, frames, codes, device))


@torch.no_grad()
def measure_speed(frames: int, codes: int, repeats: int, device: str) -> tuple[dict[str, list[float]], float]:
    """Time both in turns.

    Returns
    -------
    seconds : dict of list of float
        Of each repeat.
    agreement : float
        Share of frames with the same label.
    """
    x = random_frames(frames, device)
    quantizers = {name: build(name, codes, device) for name in (THEIRS, OURS)}
    labels = {name: quantizer(x) for name, quantizer in quantizers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in quantizers}
    for _ in range(repeats):
        for name, quantizer in quantizers.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            quantizer(x)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds, float((labels[OURS] == labels[THEIRS]).double().mean())


def table(arguments: argparse.Namespace) -> str:
    """Measure, and put the result into Markdown."""
    memory = {
        name: measure_memory(name, arguments.frames, arguments.codes, arguments.device) for name in (THEIRS, OURS)
    }
    seconds, agreement = measure_speed(arguments.frames, arguments.codes, arguments.repeats, arguments.device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians[THEIRS] / medians[OURS]
    met = ratio >= TARGET_RATIO and memory[OURS] < TARGET_MEGABYTES
    lines = [
        f"Labels of {arguments.frames} frames, {arguments.codes} codes; {arguments.repeats} repeats in turns; "
        f"{describe_machine(arguments.device)}",
        "",
        "| quantizer | median, ms | fastest - slowest, ms | extra memory, MB |",
        "|---|---|---|---|",
    ]
    for name, times in seconds.items():
        spread = f"{1e3 * min(times):.1f} - {1e3 * max(times):.1f}"
        lines.append(f"| {name} | {1e3 * medians[name]:.1f} | {spread} | {memory[name]:.1f} |")
    lines += [
        "",
        f"{ratio:.1f} times the speed (target: {TARGET_RATIO:.0f}, with less than {TARGET_MEGABYTES:.0f} MB extra, at "
        f"1200 frames and 8192 codes): {'met' if met else 'not met'}. Equal labels: {100 * agreement:.2f} % of frames.",
    ]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1200, help="frames to label (%(default)s)")
    parser.add_argument("--codes", type=int, default=8192, help="codes in the codebook (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--output", type=Path, help="a new file for the table")
    arguments = parser.parse_args(words)
    for name in ("frames", "codes", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(arguments, name)}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; take --device cpu.")
    if arguments.output and arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already: name a new file.")
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output}: the folder does not exist; make it first.")
    text = table(arguments)
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
