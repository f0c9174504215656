"""Cost of pre-training: BEST-RQ against wav2vec 2.0, on the same audio in the same run.

    python benchmarks/pretraining_cost.py
    python benchmarks/pretraining_cost.py --sizes small --precisions fp32 bf16
    python benchmarks/pretraining_cost.py --device cuda --precisions bf16 --utterances 64 --blocks 20
    python benchmarks/pretraining_cost.py --sizes small --seconds 5 --utterances 2

Models, optimizers and masks are those of the recipe's YAMLs (bestrq.yaml and wav2vec2.yaml, and their small ones). An
update is one batch: forward, backward, clipping and optimizer, through the Brain's own fit_batch. All hear the same
waveforms (noise: speed does not depend on what is said), which lie on the device already. Blocks of updates
alternate between the two, and between precisions where several are asked for, so that whatever else the machine does
falls on all alike; medians over the blocks are given with the range. FLOPs are counted analytically (model.flops).
"of product" is the rate as a share of what one large matrix product reached in the same run and precision;
"utilisation" that of the datasheet, where one is known.
Peak memory is that of the model with its optimizer over its first updates: allocated on a GPU; without one, what the
process came to hold more than before (too little for all but the first, which leaves memory for the others). All of a
size are on the device together: on a GPU that is too small for them, give one precision at a time.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import RATE, matrix_product_flops
from contenders import Ours
from torch import Tensor

from speechbrain_bestrq.accounting import datasheet_flops
from speechbrain_bestrq.allocator import keep_freed_memory
from speechbrain_bestrq.machine import describe_machine

#: The YAMLs of a size: BEST-RQ's, then wav2vec 2.0's.
YAMLS = {"base": ("bestrq", "wav2vec2"), "small": ("bestrq_small", "wav2vec2_small")}
#: Seconds for 500 updates of wav2vec 2.0 over those of BEST-RQ in the logs of arXiv 2405.04296.
PAPER_RATIO = 2.4


class Timed:
    """The updates of one YAML in one precision, and what they took."""

    def __init__(self, name: str, waveforms: list[Tensor], device: str, precision: str, folder: Path):
        self.name, self.device, self.precision = name, device, precision
        held = held_gigabytes(self.device)
        self.contender = Ours(name, self.device, precision, folder)
        self.contender.start(waveforms)
        self.parameters = sum(parameter.numel() for parameter in self.contender.model.parameters())
        self.flops, _ = self.contender.count()
        self.audio_seconds = self.contender.seconds
        self.seconds: list[float] = []
        for _ in range(2):  # warms up; from the second update on, the optimizer's moments lie beside the activations
            self.block()
        self.seconds.clear()
        self.memory = peak_gigabytes(self.device) - held

    def block(self) -> None:
        """Take an update on each batch."""
        start = time.perf_counter()
        for number in range(len(self.contender.batches)):
            self.contender.step(number)
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    @property
    def speed(self) -> float:
        """Median audio-seconds per second."""
        return self.audio_seconds / statistics.median(self.seconds)


def status_gigabytes(field: str) -> float:
    """Read a field of /proc/self/status that is given in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"/proc/self/status has no {field}.")


def held_gigabytes(device: str) -> float:
    """Memory that is held now; the peak is forgotten."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path("/proc/self/clear_refs").write_text("5")
    return status_gigabytes("VmRSS")


def peak_gigabytes(device: str) -> float:
    """The most memory held since :func:`held_gigabytes`."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else status_gigabytes("VmHWM")


def compare(size: str, waveforms: list[Tensor], arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Measure the two of a size in each precision: rows of a table, and lines on the ratios."""
    device, precisions = arguments.device, arguments.precisions
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            precision: [Timed(name, waveforms, device, precision, Path(folder)) for name in YAMLS[size]]
            for precision in precisions
        }
        for _ in range(arguments.blocks):
            for pair in contenders.values():
                for contender in pair:
                    contender.block()
    products = {precision: matrix_product_flops(device, precision) for precision in precisions}
    rows = [row(one, products[one.precision]) for pair in contenders.values() for one in pair]
    lines = []
    for precision, (ours, theirs) in contenders.items():
        lines.append(
            f"{size}, {precision}: BEST-RQ hears {ours.speed / theirs.speed:.2f} times the audio of wav2vec 2.0 in the "
            f"same time, with {theirs.flops / ours.flops:.2f} times fewer FLOPs; {PAPER_RATIO} times in the paper."
        )
    first = precisions[0]
    for precision in precisions[1:]:
        faster = [one.speed / slow.speed for one, slow in zip(contenders[precision], contenders[first], strict=True)]
        lines.append(
            f"{size}, {precision} against {first}: {faster[0]:.2f} times the speed for BEST-RQ, {faster[1]:.2f} times "
            "for wav2vec 2.0."
        )
    return rows, lines


def row(one: Timed, product: float) -> str:
    """Put what was measured of one into a row."""
    peak = datasheet_flops(torch.cuda.get_device_name(), one.precision) if one.device == "cuda" else None
    slowest, fastest = (one.audio_seconds / seconds for seconds in (max(one.seconds), min(one.seconds)))
    rate = one.flops / statistics.median(one.seconds)
    return (
        f"| {one.name} | {one.precision} | {one.parameters / 1e6:.1f} M | "
        f"{one.speed:.1f} ({slowest:.1f} - {fastest:.1f}) | {one.flops / one.audio_seconds / 1e9:.2f} | "
        f"{rate / 1e9:.0f} | {100 * rate / product:.0f} % | {'-' if peak is None else f'{100 * rate / peak:.1f} %'} | "
        f"{one.memory:.2f} |"
    )


def table(arguments: argparse.Namespace) -> str:
    """Measure, and put the result into Markdown."""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.utterances, round(arguments.seconds * RATE))
    waveforms = [(0.1 * torch.randn(shape, generator=generator)).to(arguments.device) for _ in range(arguments.updates)]
    lines = [
        f"{arguments.utterances} x {arguments.seconds:g} s an update, {arguments.blocks} blocks of {arguments.updates} "
        f"updates in turns; {describe_machine(arguments.device)}",
        "",
        "| YAML | precision | parameters | audio-s/s (range) | GFLOP/audio-s | GFLOP/s | of product | utilisation "
        "| peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    results = [compare(size, waveforms, arguments) for size in arguments.sizes]
    lines += [row for rows, _ in results for row in rows]
    return "\n".join([*lines, "", *(line for _, told in results for line in told)]) + "\n"


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    if words is None:
        keep_freed_memory()  # as the recipe does; without it: GLIBC_TUNABLES=glibc.malloc.arena_max=64
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(YAMLS), default=["small", "base"], help="of the models")
    parser.add_argument("--seconds", type=float, default=12.5, help="of an utterance (%(default)s)")
    parser.add_argument("--utterances", type=int, default=2, help="in an update (%(default)s)")
    parser.add_argument("--updates", type=int, default=1, help="in a block (%(default)s)")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32"], help="(fp32)")
    arguments = parser.parse_args(words)
    arguments.precisions = list(dict.fromkeys(arguments.precisions))
    if min(arguments.utterances, arguments.updates, arguments.blocks) < 1 or arguments.seconds < 1.0:
        parser.error("give at least one utterance, update and block, and one second.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; take --device cpu.")
    print(table(arguments), end="")


if __name__ == "__main__":
    main()
