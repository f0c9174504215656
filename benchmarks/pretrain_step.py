"""Speed of a pre-training step: this project's, and others' on the same audio in the same run.

    python benchmarks/pretrain_step.py                                  # CPU, 4 x 12.5 s, fp32
    python benchmarks/pretrain_step.py --device cuda --precision bf16 --seconds mix 12 30 60 \\
        --micro_batches 100 400 1600 --compile
    python benchmarks/pretrain_step.py --size small --seconds 4 --utterances 2 --repeats 1

Contenders:

    SpeechBrain                  its modules, put together as its recipe does (speechbrain_step.py)
    ours, relative               the same model: relative positions, 8 heads
    ours, rotary                 bestrq.yaml: another model (rotary positions, 9 heads)
    ours, wav2vec 2.0            wav2vec2.yaml
    transformers, wav2vec 2.0    Wav2Vec2ForPreTraining of the same size, if transformers is installed
    "+ compile"                  the same, compiled as --compile does; the time to compile is given apart

First our step of the same model is held against SpeechBrain's (equivalence.py): same labels, loss and gradients, or
nothing is measured.
All get the same resident waveforms (noise: speed does not depend on what is said), of each of the lengths given by
--seconds, where mix is a histogram like LibriSpeech's. A step is forward, backward, clipping and
optimizer, through each one's own fit_batch. Blocks of steps alternate between the contenders, so that whatever else
the machine does falls on all alike; medians over the blocks are given with the range. With several --micro_batches
(seconds of audio in a step) each contender is shown at its best.

FLOPs are counted analytically for our models (model.flops); for the others' those of the equal model of ours, so that
the columns compare. "of product" is the share of what a matrix product reached in the same run. "operators" and "MB"
are counted in eager mode (traffic.py): what a step computes, and what that reads and writes without fusion.
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
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import RATE, librispeech_lengths, matrix_product_flops, wait
from contenders import (
    BESTRQ,
    HEADS,
    WAV2VEC2,
    Contender,
    Ours,
    SpeechBrainStep,
    TransformersStep,
    transformers_is_installed,
)
from equivalence import compare, make_pair
from torch import Tensor
from traffic import count_traffic

from speechbrain_bestrq.accounting import datasheet_flops
from speechbrain_bestrq.batching import LadderBatchSampler
from speechbrain_bestrq.machine import commit, describe_machine, device_name, package_versions
from speechbrain_bestrq.pretraining import allow_many_shapes

#: What the others are compared with.
SPEECHBRAIN = "SpeechBrain"
ROTARY = "ours, rotary"


@dataclass
class Measurement:
    """A contender at one length and one micro-batch."""

    contender: str
    seconds: str
    """Of an utterance."""
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
    """As a GPU's trace shows them."""
    operators_per_step: float | None = None
    megabytes_per_audio_second: float | None = None
    idle_share: float | None = None

    @property
    def speed(self) -> float:
        """Median audio-seconds per second."""
        return self.audio_seconds / statistics.median(self.block_seconds)


# ---------------------------------------------------------------- audio


def make_waveforms(arguments: argparse.Namespace, duration: str, micro_batch_seconds: float | None) -> list[Tensor]:
    """Resident batches of unpadded noise, shape (B, N) each."""
    generator = torch.Generator().manual_seed(0)
    if duration == "mix":
        sampler = LadderBatchSampler(librispeech_lengths(20000), round((micro_batch_seconds or 100) * RATE))
        shapes = spread([(len(plan.indices), plan.samples) for plan in sampler], arguments.steps)
    else:
        samples = round(float(duration) * RATE)
        utterances = arguments.utterances
        if micro_batch_seconds is not None:
            utterances = max(round(micro_batch_seconds * RATE / samples), 1)
        shapes = [(utterances, samples)] * arguments.steps
    return [(0.1 * torch.randn(shape, generator=generator)).to(arguments.device) for shape in shapes]


def spread(shapes: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Some of an epoch's batches whose lengths are spread as its audio is, whatever the size of the batches."""
    shapes = sorted(shapes, key=lambda shape: shape[1])
    audio = np.cumsum([utterances * samples for utterances, samples in shapes])
    middles = (np.arange(count) + 0.5) / count
    return [shapes[place] for place in np.searchsorted(audio, middles * audio[-1])]


# ---------------------------------------------------------------- contenders


def make_contenders(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Contender]]:
    """What is compared, by name; each is built when it is called."""
    size, where = arguments.size, (arguments.device, arguments.precision, folder)

    def bestrq(attention: str, compiled: bool) -> Ours:
        sizes = {**BESTRQ[size], "num_heads": HEADS[size][attention], "whiten": None}
        return Ours("bestrq", *where, compiled, sizes, attention)

    builders: dict[str, Callable[[bool], Contender]] = {
        SPEECHBRAIN: lambda compiled: SpeechBrainStep(size, *where, compiled),
        "ours, relative": lambda compiled: bestrq("relative", compiled),
        ROTARY: lambda compiled: bestrq("rotary", compiled),
        "ours, wav2vec 2.0": lambda compiled: Ours("wav2vec2", *where, compiled, WAV2VEC2[size]),
    }
    if transformers_is_installed():
        builders["transformers, wav2vec 2.0"] = lambda compiled: TransformersStep(size, *where, compiled)
    contenders = {name: partial(build, False) for name, build in builders.items()}
    if arguments.compile:
        contenders |= {f"{name} + compile": partial(build, True) for name, build in builders.items()}
    return {name: build for name, build in contenders.items() if arguments.only is None or name in arguments.only}


# ---------------------------------------------------------------- measuring


def run_block(contender: Contender, device: str) -> float:
    """Seconds of one step on each batch."""
    wait(device)
    started = time.perf_counter()
    for number in range(len(contender.batches)):
        contender.step(number)
    wait(device)
    return time.perf_counter() - started


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory has run out, as PyTorch says it, or cuBLAS, or cuDNN, which then finds no algorithm."""
    told = ["out of memory", "CUBLAS_STATUS_ALLOC_FAILED"]
    # which it also says of what it cannot do at all
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 0.1 * torch.cuda.mem_get_info()[1]:
        told.append("unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError) or any(one in str(error) for one in told)


def trace(contender: Contender, device: str, seconds: float) -> tuple[float, float]:
    """Kernels in a step on a GPU, and the share of a block in which it does nothing.

    ``seconds`` are those of a block that nobody watched: watched, each launch takes longer.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_block(contender, device)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return len(events) / len(contender.batches), max(1 - busy / 1e6 / seconds, 0.0)


def measure(arguments: argparse.Namespace, folder: Path, report: Callable[[str], None]) -> list[Measurement]:
    """Measure every contender at every length and micro-batch."""
    measurements = []
    cuda = arguments.device.startswith("cuda")
    for duration, micro_batch in product(arguments.seconds, arguments.micro_batches or [None]):
        torch._dynamo.reset()
        allow_many_shapes()
        waveforms = make_waveforms(arguments, duration, micro_batch)
        step_seconds = sum(wavs.numel() for wavs in waveforms) / RATE / len(waveforms)
        running: list[tuple[Contender, Measurement]] = []
        for name, build in make_contenders(arguments, folder).items():
            report(f"{name}: utterances of {duration} s, {step_seconds:.0f} s of audio in a step, first block")
            contender, held = None, 0
            if cuda:
                gc.collect()  # what ran out of memory before is gone; the others are held
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            try:
                contender = build()
                contender.start(waveforms)
                first = run_block(contender, arguments.device)
                if len(waveforms) == 1:  # from the second update on, the optimizer's moments lie beside the activations
                    run_block(contender, arguments.device)
            except Exception as error:
                spent = isinstance(error, RuntimeError) and is_out_of_memory(error)
                if not spent and name.startswith("ours"):
                    raise
                # others' code may not run with what is installed: ours is measured all the same
                report(f"{name}: {'out of memory' if spent else f'FAILED, {error!r},'} at {step_seconds:.0f} s")
                continue
            flops, share = contender.count()
            measurement = Measurement(
                name, duration, step_seconds, contender.seconds, flops, share, first_seconds=first
            )
            if cuda:
                measurement.peak_memory_gb = (torch.cuda.max_memory_allocated() - held) / 1e9
            running.append((contender, measurement))
        for _ in range(arguments.repeats):
            for _ in range(len(running)):
                contender, measurement = running.pop(0)
                try:
                    measurement.block_seconds.append(run_block(contender, arguments.device))
                    running.append((contender, measurement))
                except RuntimeError as error:  # with the others' memory held
                    if not is_out_of_memory(error):
                        raise
                    report(f"{measurement.contender}: out of memory at {step_seconds:.0f} s in a later block")
                contender = None
                gc.collect()  # what ran out of memory is gone before the next block
        for contender, measurement in running:
            try:
                if cuda:
                    usual = statistics.median(measurement.block_seconds)
                    measurement.kernels_per_step, measurement.idle_share = trace(contender, arguments.device, usual)
                if not measurement.contender.endswith("compile"):
                    traffic = count_traffic(partial(run_block, contender, arguments.device))
                    measurement.operators_per_step = traffic.kernels / len(waveforms)
                    measurement.megabytes_per_audio_second = traffic.bytes / 1e6 / contender.seconds
            except RuntimeError as error:  # its times are good
                if not is_out_of_memory(error):
                    raise
                report(f"{measurement.contender}: out of memory at {step_seconds:.0f} s while its kernels were counted")
        measurements += [measurement for _, measurement in running]
        contender = None
        running.clear()
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return measurements


# ---------------------------------------------------------------- the table


def table(measurements: list[Measurement], product_flops: float, arguments: argparse.Namespace, device: str) -> str:
    """The best micro-batch of each contender at each length, as Markdown."""
    lines = [
        f"{arguments.size} model, {arguments.precision}, {describe_machine(arguments.device)}; "
        f"{arguments.steps} steps a block, {arguments.repeats} blocks in turns; "
        f"a matrix product reached {product_flops / 1e12:.2f} TFLOP/s",
    ]
    peak = datasheet_flops(device, arguments.precision)
    for duration in arguments.seconds:
        best: dict[str, Measurement] = {}
        for one in (one for one in measurements if one.seconds == duration):
            if one.contender not in best or one.speed > best[one.contender].speed:
                best[one.contender] = one
        base = best.get(SPEECHBRAIN)
        lines += [
            "",
            f"Utterances of {duration} s:" if duration != "mix" else "Utterances as long as LibriSpeech's:",
            "",
            "| contender | s in a step | audio-s/s, median (range) | h/s | x SpeechBrain | GFLOP/s | of product "
            "| of datasheet | masked | peak GB | operators | MB/audio-s | kernels | idle | first block, s |",
            f"|{'---|' * 15}",
        ]
        for name, one in best.items():
            rates = [one.audio_seconds / seconds for seconds in one.block_seconds]
            flops = one.flops / statistics.median(one.block_seconds)
            cells = [
                name,
                f"{one.micro_batch_seconds:.0f}",
                f"{one.speed:.1f} ({min(rates):.1f}-{max(rates):.1f})",
                f"{one.speed / 3600:.3f}",
                "" if base is None else f"{one.speed / base.speed:.2f}",
                f"{flops / 1e9:.0f}",
                f"{flops / product_flops:.0%}",
                "" if peak is None else f"{flops / peak:.0%}",
                f"{one.mask_share:.0%}",
                _told(one.peak_memory_gb, ".1f"),
                _told(one.operators_per_step, ".0f"),
                _told(one.megabytes_per_audio_second, ".0f"),
                _told(one.kernels_per_step, ".0f"),
                _told(one.idle_share, ".0%"),
                f"{one.first_seconds:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "GFLOP/s: analytic, of the model with its head on masked frames only. operators, MB: what an eager step "
        f"computes, and what that reads and writes. {ROTARY}, and wav2vec 2.0: other models than {SPEECHBRAIN}'s.",
    ]
    return "\n".join(lines)


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def parse(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--size", default="base", choices=sorted(BESTRQ))
    parser.add_argument("--seconds", nargs="+", default=["12.5"], help="durations of the utterances, or mix")
    parser.add_argument("--utterances", type=int, default=4, help="in a step, without --micro_batches")
    parser.add_argument("--micro_batches", type=float, nargs="+", help="seconds of audio in a step, to find the best")
    parser.add_argument("--steps", type=int, default=4, help="in a block")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of each contender")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="these, as the table names them")
    parser.add_argument("--compile", action="store_true", help="the compiled contenders too")
    parser.add_argument("--output", type=Path, help="Markdown file to write; the raw figures go beside it as JSON")
    arguments = parser.parse_args(words)
    for duration in arguments.seconds:
        if duration != "mix" and not duration.replace(".", "", 1).isdecimal():
            parser.error(f"--seconds takes numbers and mix, not {duration}")
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
    equal = compare(*make_pair())
    if not equal.holds:
        raise SystemExit(f"our step of the same model does not compute what SpeechBrain's does: {equal}")
    product_flops = matrix_product_flops(arguments.device, arguments.precision)
    with tempfile.TemporaryDirectory() as folder:
        measurements = measure(arguments, Path(folder), lambda text: print(text, file=sys.stderr, flush=True))
    text = f"{table(measurements, product_flops, arguments, device)} Equal to {SPEECHBRAIN} before that: {equal}."
    print(text)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")
        raw = {
            "device": device,
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "versions": package_versions(),
            "commit": commit(),
            "matrix_product_flops": product_flops,
            "measurements": [asdict(m) for m in measurements],
        }
        arguments.output.with_suffix(".json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
