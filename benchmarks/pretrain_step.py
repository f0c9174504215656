"""Speed of a pre-training step: this project's, and SpeechBrain's on the same audio in the same run.

    python benchmarks/pretrain_step.py                                  # CPU, 4 x 12.5 s, fp32
    python benchmarks/pretrain_step.py --device cuda --precision bf16 --micro_batches 100 400 1600
    python benchmarks/pretrain_step.py --size small --seconds 4 --utterances 2 --repeats 1

Contenders:

    SpeechBrain            its modules, put together as its recipe does (speechbrain_step.py)
    ours, relative         the same model: relative positions, 8 heads
    ours, rotary           bestrq.yaml: another model (rotary positions, 9 heads)
    "+ compile"            the same, compiled as --compile does; the time to compile is given apart

All get the same resident waveforms (noise: speed does not depend on what is said), of the lengths given by
--seconds, or with --seconds mix of a histogram like LibriSpeech's. A step is forward, backward, clipping and
optimizer, through each one's own fit_batch. Blocks of steps alternate between the contenders, so that whatever else
the machine does falls on all alike; medians over the blocks are given with the range. With several --micro_batches
(seconds of audio in a step) each contender is shown at its best.

FLOPs are counted analytically for our models (model.flops); for SpeechBrain's those of the equal model, so that
the columns compare. "of product" is the share of what a matrix product reached in the same run.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain_step import SpeechBrainBestRQ, SpeechBrainBestRQBrain, make_batch
from torch import Tensor

from speechbrain_bestrq.accounting import datasheet_flops
from speechbrain_bestrq.batching import LadderBatchSampler
from speechbrain_bestrq.machine import describe_machine, device_name
from speechbrain_bestrq.pretraining import PretrainingBrain
from speechbrain_bestrq.pretraining_data import PretrainingBatch

RATE = 16000
HPARAMS = Path(__file__).resolve().parents[1] / "recipes" / "LibriSpeech" / "pretrain" / "hparams"

#: Durations of LibriSpeech's training utterances at every tenth of them, seconds.
LIBRISPEECH_DECILES = (1.3, 4.9, 8.7, 11.6, 13.2, 14.0, 14.6, 15.1, 15.6, 16.0, 24.5)

#: bestrq.yaml's sizes, and smaller ones for a test.
SIZES = {
    "base": {"d_model": 576, "num_layers": 12, "d_ffn": 2048, "codebook_size": 8192},
    "small": {"d_model": 48, "num_layers": 1, "d_ffn": 96, "codebook_size": 256},
}
HEADS = {"base": {"relative": 8, "rotary": 9}, "small": {"relative": 4, "rotary": 4}}


@dataclass
class Measurement:
    """A contender at one micro-batch."""

    contender: str
    micro_batch_seconds: float
    audio_seconds: float
    """Audio in a block."""
    flops: float
    """Analytic, of a block."""
    mask_share: float
    block_seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    """The first block, compilation included."""
    peak_memory_gb: float | None = None
    kernels_per_step: float | None = None
    idle_share: float | None = None

    @property
    def speed(self) -> float:
        """Median audio-seconds per second."""
        return self.audio_seconds / statistics.median(self.block_seconds)


# ---------------------------------------------------------------- audio


def make_waveforms(arguments: argparse.Namespace, micro_batch_seconds: float | None) -> list[Tensor]:
    """Resident batches of unpadded noise, shape (B, N) each."""
    generator = torch.Generator().manual_seed(0)
    if arguments.seconds == "mix":
        draw = np.random.default_rng(0)
        seconds = np.interp(draw.random(4000), np.linspace(0, 1, len(LIBRISPEECH_DECILES)), LIBRISPEECH_DECILES)
        sampler = LadderBatchSampler(np.rint(seconds * RATE).astype(int), round((micro_batch_seconds or 100) * RATE))
        shapes = [(len(plan.indices), plan.samples) for plan, _ in zip(sampler, range(arguments.steps), strict=False)]
    else:
        samples = round(float(arguments.seconds) * RATE)
        utterances = arguments.utterances
        if micro_batch_seconds is not None:
            utterances = max(round(micro_batch_seconds * RATE / samples), 1)
        shapes = [(utterances, samples)] * arguments.steps
    return [(0.1 * torch.randn(shape, generator=generator)).to(arguments.device) for shape in shapes]


# ---------------------------------------------------------------- contenders


class ResidentBatches(list):
    """Batches that are on the device already; what the Brain asks of a sampler."""

    epoch, position = 1, 0


class Ours:
    """This project's step, through its Brain."""

    def __init__(self, attention: str, compiled: bool, arguments: argparse.Namespace, folder: Path):
        sizes = {**SIZES[arguments.size], "num_heads": HEADS[arguments.size][attention]}
        overrides = {"data_folder": "none", "output_folder": str(folder), "whiten": None, **sizes}
        with open(HPARAMS / "bestrq.yaml", encoding="utf-8") as file:
            text = file.read().replace("attention: rotary", f"attention: {attention}")
        hparams = load_hyperpyyaml(text, overrides)
        model = hparams["model"]
        wavs = 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
        model.measure([(wavs, None)])
        self.brain = PretrainingBrain(
            {"model": model},
            hparams["optimizer"],
            {**hparams, "grad_accumulation_factor": 1, "log_interval": 10**9, "valid_interval": None},
            {
                "device": arguments.device,
                "precision": arguments.precision,
                "compile": compiled,
                "noprogressbar": True,
                "distributed_backend": "gloo",
            },
            None,
            {},
        )
        self.model = model

    def start(self, waveforms: list[Tensor]) -> None:
        """Prepare the batches with their masks, and the Brain."""
        self.batches = ResidentBatches(self._batch(number, wavs) for number, wavs in enumerate(waveforms))
        self.brain.sampler = self.batches
        self.brain.on_fit_start()
        self.brain.step = 0

    def _batch(self, number: int, wavs: Tensor) -> PretrainingBatch:
        frames = self.model.speech_encoder.num_frames(wavs.shape[1])
        generator = torch.Generator().manual_seed(number)
        masked = self.model.masking(torch.full((len(wavs),), frames), frames, generator)
        seconds = wavs.numel() / RATE
        return PretrainingBatch(wavs, None, masked, number, number, number, seconds, 0.0).to(wavs.device)

    def step(self, number: int) -> None:
        """Take an update on a batch."""
        self.brain.step = 1  # not the last of the epoch; every one is an update
        self.brain.fit_batch(self.batches[number])

    def count(self) -> tuple[float, float]:
        """FLOPs of a block, and its share of masked frames."""
        shapes = [batch.masked.mask.shape for batch in self.batches]
        targets = [batch.masked.count for batch in self.batches]
        flops = sum(self.model.flops(*shape, count) for shape, count in zip(shapes, targets, strict=True))
        return flops, sum(targets) / sum(shape.numel() for shape in shapes)


class Theirs:
    """SpeechBrain's step, through its Brain."""

    def __init__(self, compiled: bool, arguments: argparse.Namespace, folder: Path):
        sizes = {**SIZES[arguments.size], "num_heads": HEADS[arguments.size]["relative"]}
        # eager whatever is wanted: the FLOPs are those of the equal model of ours
        self.equal = Ours("relative", False, arguments, folder)
        options = {"device": arguments.device, "precision": arguments.precision, "max_grad_norm": 10.0}
        if compiled:
            options |= {"compile": True, "compile_module_keys": ["model"]}
        self.brain = SpeechBrainBestRQBrain(
            {"model": SpeechBrainBestRQ(**sizes)},
            lambda parameters: torch.optim.AdamW(
                parameters, lr=8e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01, fused=True
            ),
            run_opts=options,
        )
        self.brain.modules["model"].compute_features.to(arguments.device)

    def start(self, waveforms: list[Tensor]) -> None:
        """Draw the masks by SpeechBrain's function."""
        torch.manual_seed(0)
        self.batches = [make_batch(wavs) for wavs in waveforms]
        self.frames = [(len(wavs), (1 + wavs.shape[1] // 160) // 4) for wavs in waveforms]
        self.brain.on_fit_start()
        self.brain.step = 0
        self.brain.modules.train()

    def step(self, number: int) -> None:
        """Take an update on a batch."""
        self.brain.step = 0
        self.brain.fit_batch(self.batches[number])

    def count(self) -> tuple[float, float]:
        """FLOPs of a block, counted as if only masked frames met the head, and its share of masked frames."""
        targets = [len(wavs) * len(mask) // 4 for wavs, _, mask, _ in self.batches]
        flops = sum(self.equal.model.flops(*shape, count) for shape, count in zip(self.frames, targets, strict=True))
        return flops, sum(targets) / sum(batch * frames for batch, frames in self.frames)


def make_contenders(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Ours | Theirs]]:
    """What is compared, by name; each is built when it is called."""
    contenders = {
        "SpeechBrain": lambda: Theirs(False, arguments, folder),
        "ours, relative": lambda: Ours("relative", False, arguments, folder),
        "ours, rotary": lambda: Ours("rotary", False, arguments, folder),
    }
    if arguments.compile:
        contenders["SpeechBrain + compile"] = lambda: Theirs(True, arguments, folder)
        contenders["ours, relative + compile"] = lambda: Ours("relative", True, arguments, folder)
        contenders["ours, rotary + compile"] = lambda: Ours("rotary", True, arguments, folder)
    return contenders


# ---------------------------------------------------------------- measuring


def wait(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def run_block(contender: Ours | Theirs, device: str) -> float:
    """Seconds of one step on each batch."""
    wait(device)
    started = time.perf_counter()
    for number in range(len(contender.batches)):
        contender.step(number)
    wait(device)
    return time.perf_counter() - started


def trace(contender: Ours | Theirs, device: str) -> tuple[float, float | None]:
    """Kernels (on a CPU: operators) in a step, and the share of a block in which a GPU did nothing."""
    cuda = device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        seconds = run_block(contender, device)
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() if event.device_type == kind]
    if not cuda:
        events = [event for event in events if event.name.startswith("aten::") and event.cpu_parent is None]
        return len(events) / len(contender.batches), None
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return len(events) / len(contender.batches), 1 - busy / 1e6 / seconds


def matrix_product_flops(device: str, precision: str) -> float:
    """FLOP/s of a large matrix product on this device, the best of five."""
    size = 8192 if device.startswith("cuda") else 1536
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def measure(arguments: argparse.Namespace, folder: Path, report: Callable[[str], None]) -> list[Measurement]:
    """Measure every contender at every micro-batch."""
    measurements = []
    for micro_batch in arguments.micro_batches or [None]:
        waveforms = make_waveforms(arguments, micro_batch)
        audio = sum(wavs.numel() for wavs in waveforms) / RATE
        running: list[tuple[Ours | Theirs, Measurement]] = []
        for name, build in make_contenders(arguments, folder).items():
            report(f"{name}: {audio / len(waveforms):.0f} s of audio in a step, first block")
            try:
                contender = build()
                contender.start(waveforms)
                if arguments.device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                first = run_block(contender, arguments.device)
            except torch.OutOfMemoryError:
                report(f"{name}: out of memory at {audio / len(waveforms):.0f} s")
                continue
            flops, share = contender.count()
            measurement = Measurement(name, audio / len(waveforms), audio, flops, share, first_seconds=first)
            if arguments.device.startswith("cuda"):
                measurement.peak_memory_gb = torch.cuda.max_memory_allocated() / 1e9
            running.append((contender, measurement))
        for _ in range(arguments.repeats):
            for contender, measurement in running:
                measurement.block_seconds.append(run_block(contender, arguments.device))
        for contender, measurement in running:
            measurement.kernels_per_step, measurement.idle_share = trace(contender, arguments.device)
        measurements += [measurement for _, measurement in running]
        del contender
        running.clear()
        gc.collect()
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return measurements


# ---------------------------------------------------------------- the table


def table(measurements: list[Measurement], product: float, arguments: argparse.Namespace, device: str) -> str:
    """The best micro-batch of each contender, as Markdown."""
    best: dict[str, Measurement] = {}
    for measurement in measurements:
        if measurement.contender not in best or measurement.speed > best[measurement.contender].speed:
            best[measurement.contender] = measurement
    peak = datasheet_flops(device, arguments.precision)
    base = best.get("SpeechBrain")
    lines = [
        f"{arguments.size} model, {arguments.precision}, {describe_machine(arguments.device)}; "
        f"{arguments.seconds} s utterances, {arguments.steps} steps a block, {arguments.repeats} blocks in turns; "
        f"a matrix product reached {product / 1e12:.2f} TFLOP/s",
        "",
        "| contender | s in a step | audio-s/s, median (range) | h/s | x SpeechBrain | GFLOP/s | of product "
        "| of datasheet | masked | peak GB | kernels | idle | first block, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in best.items():
        rates = [one.audio_seconds / seconds for seconds in one.block_seconds]
        flops = one.flops / statistics.median(one.block_seconds)
        lines.append(
            f"| {name} | {one.micro_batch_seconds:.0f} | {one.speed:.1f} ({min(rates):.1f}-{max(rates):.1f}) "
            f"| {one.speed / 3600:.3f} | {'' if base is None else f'{one.speed / base.speed:.2f}'} | {flops / 1e9:.0f} "
            f"| {flops / product:.0%} | {'' if peak is None else f'{flops / peak:.0%}'} | {one.mask_share:.0%} "
            f"| {'' if one.peak_memory_gb is None else f'{one.peak_memory_gb:.1f}'} | {one.kernels_per_step:.0f} "
            f"| {'' if one.idle_share is None else f'{one.idle_share:.0%}'} | {one.first_seconds:.1f} |"
        )
    unit = "kernels" if arguments.device.startswith("cuda") else "operators outside others"
    lines += ["", f"kernels: {unit} in a step. GFLOP/s: analytic, of the model with its head on masked frames only."]
    return "\n".join(lines)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--size", default="base", choices=sorted(SIZES))
    parser.add_argument("--seconds", default="12.5", help="duration of the utterances, or mix")
    parser.add_argument("--utterances", type=int, default=4, help="in a step, without --micro_batches")
    parser.add_argument("--micro_batches", type=float, nargs="+", help="seconds of audio in a step, to find the best")
    parser.add_argument("--steps", type=int, default=4, help="in a block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each contender")
    parser.add_argument("--compile", action="store_true", help="the compiled contenders too")
    parser.add_argument("--output", type=Path, help="Markdown file to write; the raw figures go beside it as JSON")
    arguments = parser.parse_args(words)
    if arguments.seconds != "mix" and not arguments.seconds.replace(".", "", 1).isdecimal():
        parser.error(f"--seconds is a number or mix, not {arguments.seconds}")
    if min(arguments.utterances, arguments.steps, arguments.repeats) < 1:
        parser.error("--utterances, --steps and --repeats must be at least 1")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: there is no GPU here")
    if arguments.output is not None and arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already: name another file")
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measure, print, write."""
    arguments = parse(words)
    device = device_name(arguments.device)
    product = matrix_product_flops(arguments.device, arguments.precision)
    with tempfile.TemporaryDirectory() as folder:
        measurements = measure(arguments, Path(folder), lambda text: print(text, file=sys.stderr, flush=True))
    text = table(measurements, product, arguments, device)
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
        raw = {"device": device, "matrix_product_flops": product, "measurements": [asdict(m) for m in measurements]}
        arguments.output.with_suffix(".json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
