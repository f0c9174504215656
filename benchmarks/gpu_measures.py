"""Parts of gpu_session.py that measure: speed, memory, cost, kernels."""

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pretrain_step
import torch
from common import RATE, matrix_product_flops, wait
from contenders import Contender, Ours
from equivalence import compare, make_pair
from gpu_findings import Findings, Settings, markdown_table
from pretraining_cost import Timed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from speechbrain_bestrq.attention import attend
from speechbrain_bestrq.convolution import FrameConvolution
from speechbrain_bestrq.machine import device_name

#: What the paper ran: updates, seconds of audio in each, and its hours of V100s (arXiv 2405.04296, Table 1).
PAPER_UPDATES, PAPER_UPDATE_SECONDS = 200_000, 800.0
PAPER_HOURS = {"BEST-RQ": 109.0, "wav2vec 2.0": 262.0}
#: Kernels that are listed of a trace.
LISTED = 12
#: A stage is begun if so much is left of what it would take by the slowest contender of its kind so far.
STAGE_SHARE = 0.7


def precision(settings: Settings) -> str:
    """That of the measured steps."""
    return "fp32" if settings.toy else "bf16"


def step_words(settings: Settings, *more: str) -> list[str]:
    """A command line of pretrain_step.py."""
    size = ["--size", "small"] if settings.toy else []
    return ["--device", settings.device, "--precision", precision(settings), *size, *more]


def say(text: str) -> None:
    """Say in the log what is being measured."""
    print(text, flush=True)


# ---------------------------------------------------------------- the table of pretrain_step.py


def steps(settings: Settings, findings: Findings, seconds: float) -> None:
    """The table of pretrain_step.py: eager at one length, compiled, and eager on LibriSpeech's mix of lengths."""
    ends = time.monotonic() + seconds
    equal = compare(*make_pair())
    findings.row("SpeechBrain's step and ours", str(equal), equal.holds)
    length, micro_batch, repeats = ("2", "4", "1") if settings.toy else ("12.5", "400", "3")
    product = matrix_product_flops(settings.device, precision(settings))
    findings.figures["matrix_product_flops"] = product
    compiled = [pretrain_step.ROTARY]
    if not settings.toy:
        compiled += ["ours, wav2vec 2.0", "ours, relative", pretrain_step.SPEECHBRAIN]
    alike = ["--seconds", length, "--micro_batches", micro_batch, "--steps", "4", "--repeats", repeats]
    stages = [alike, *([*alike, "--compile", "--only", f"{name} + compile"] for name in compiled)]
    mix = (
        ["--micro_batches", "30", "--steps", "1"] if settings.toy else ["--micro_batches", micro_batch, "--steps", "4"]
    )
    stages.insert(2, ["--seconds", "mix", *mix, "--repeats", repeats])  # the default compiled is worth more
    measurements: list[pretrain_step.Measurement] = []

    def tell(text: str) -> None:
        say(text)
        failed = "FAILED" in text  # another's code
        if failed or "out of memory" in text:
            findings.row(text.partition(":")[0], text[:200], False if failed else None)

    base: dict[str, float] = {}
    longest = {True: 0.0, False: 0.0}  # seconds of a contender, compiled or eager
    alone = 1  # contenders where none is chosen
    for stage in stages:
        started = time.monotonic()
        is_compiled = "--compile" in stage
        # compiled takes at least as long as eager
        expected = max(longest.values()) if is_compiled else alone * longest[False]
        if ends - started < STAGE_SHARE * expected:
            findings.row(" ".join(stage), "left out: the time is over")
            continue
        arguments = pretrain_step.parse(step_words(settings, *stage))
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = pretrain_step.measure(arguments, Path(folder), tell)
        except Exception as error:  # the other stages are worth having
            traceback.print_exc()
            findings.row(" ".join(stage), f"{type(error).__name__}: {' '.join(str(error).split())[:160]}", False)
            free_memory(settings)
            continue
        measurements += found
        base |= {one.seconds: one.speed for one in found if one.contender == pretrain_step.SPEECHBRAIN}
        findings.figures["steps"] = [asdict(one) for one in measurements]
        arguments.seconds = list(dict.fromkeys(one.seconds for one in measurements))
        text = pretrain_step.table(measurements, product, arguments, device_name(settings.device))
        findings.section("A training step", f"{text} Equal to {pretrain_step.SPEECHBRAIN} before that: {equal}.")
        for one in found:
            ratio = f", x SpeechBrain's eager {one.speed / base[one.seconds]:.2f}" if one.seconds in base else ""
            reached = one.flops / statistics.median(one.block_seconds) / product
            findings.row(
                f"{one.contender} ({one.seconds} s)",
                f"{one.speed:.1f} audio-s/s{ratio}, {reached:.0%} of a matrix product{_memory(one)}{_idle(one)}",
            )
        alone = max(alone, len(found))
        longest[is_compiled] = max(longest[is_compiled], (time.monotonic() - started) / max(len(found), 1))


def _memory(one: pretrain_step.Measurement) -> str:
    return "" if one.peak_memory_gb is None else f", {one.peak_memory_gb:.1f} GB"


def _idle(one: pretrain_step.Measurement) -> str:
    return "" if one.idle_share is None else f", {one.idle_share:.0%} idle"


def micro_batches(settings: Settings, findings: Findings, seconds: float) -> None:
    """Both methods at micro-batches up to a whole update."""
    names = [pretrain_step.ROTARY, "ours, wav2vec 2.0"]
    length, tried = ("2", ["2", "4"]) if settings.toy else ("12.5", ["100", "200", "800", "1600", "3200", "6400"])
    measured: list[pretrain_step.Measurement] = []
    ends, last = time.monotonic() + seconds, 0.0
    for micro_batch in tried:
        started = time.monotonic()
        if ends - started < last:
            findings.row("larger micro-batches", f"left out from {micro_batch} s on: the time is over")
            break
        words = ["--seconds", length, "--steps", "1", "--repeats", "3", "--micro_batches", micro_batch]
        found = []
        for name in names:  # each by itself: a failure of one, at sizes that few have tried, is not the other's
            arguments = pretrain_step.parse(step_words(settings, *words, "--only", name))
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found += pretrain_step.measure(arguments, Path(folder), say)
            except RuntimeError as error:
                traceback.print_exc()
                told = " ".join(str(error).split())[:160]
                findings.row(f"{name}, {micro_batch} s in a micro-batch", f"{type(error).__name__}: {told}", False)
            # before memory is given back, which an error of the device would not let happen
            findings.figures["micro_batches"] = [asdict(one) for one in (*measured, *found)]
            free_memory(settings)
        measured += found
        findings.figures["micro_batches"] = [asdict(one) for one in measured]
        rows = [
            (one.contender, f"{one.micro_batch_seconds:.0f}", f"{one.speed:.1f}", _memory(one)[2:], _idle(one)[2:])
            for one in measured
        ]
        heads = ("contender", "s in a micro-batch", "audio-s/s", "peak memory", "idle")
        findings.section("Micro-batches up to an update, eager", markdown_table(heads, rows))
        for name in names:
            mine = [one for one in measured if one.contender == name]
            if mine:
                best = max(mine, key=lambda one: one.speed)
                largest = max(one.micro_batch_seconds for one in mine)
                outcome = (
                    f"best at {best.micro_batch_seconds:.0f} s: {best.speed:.1f} audio-s/s; {largest:.0f} s fitted"
                )
                findings.row(f"{name}, micro-batch", outcome)
        if not found:  # out of memory
            break
        last = time.monotonic() - started


# ---------------------------------------------------------------- the paper's headline


def cost(settings: Settings, findings: Findings, seconds: float) -> None:
    """GPU-seconds of an hour of audio, their ratio, and what the paper's own runs would take."""
    pairs = (
        [("bestrq_small", "wav2vec2_small")]
        if settings.toy
        else [("bestrq_paper", "wav2vec2_paper"), ("bestrq", "wav2vec2")]
    )
    rows, ratios = [], {}
    for pair in pairs:
        timed = [_largest_that_fits(name, settings) for name in pair]
        for _ in range(2 if settings.toy else 8):
            for one in timed:
                one.block()
        for (method, hours), one in zip(PAPER_HOURS.items(), timed, strict=True):
            projected = PAPER_UPDATES * PAPER_UPDATE_SECONDS / 3600 / one.speed
            findings.figures[f"cost {one.name}"] = {
                "audio_seconds_per_second": one.speed,
                "block_seconds": one.seconds,
                "micro_batch_seconds": one.audio_seconds,
                "peak_memory_gb": one.memory,
                "projected_hours": projected,
            }
            rows.append(
                (
                    f"{one.name}.yaml",
                    f"{one.audio_seconds:.0f}",
                    f"{one.speed:.1f}",
                    f"{3600 / one.speed:.2f}",
                    f"{one.memory:.1f}",
                    f"{projected:.1f}",
                    f"{hours:.0f}",
                )
            )
            findings.row(
                one.name,
                f"{3600 / one.speed:.2f} device-seconds an audio-hour; 200k updates of 800 s would take "
                f"{projected:.1f} hours, the paper's {method} took {hours:.0f} V100-hours",
            )
        first, second = timed
        ratios[" / ".join(pair)] = first.speed / second.speed
        findings.row(
            f"{second.name} / {first.name}", f"{first.speed / second.speed:.2f} times the cost; 2.40 in the paper"
        )
        findings.figures["cost_ratios"] = ratios
        heads = ("YAML", "s in an update", "audio-s/s", "device-s an audio-hour", "peak GB")
        heads += ("hours for 200k x 800 s", "the paper's V100-hours")
        text = (
            f"{markdown_table(heads, rows)}\n\n{device_name(settings.device)}, {precision(settings)}, eager, audio "
            "on the device already, one micro-batch an update. The paper's were in fp32, with reading, validation and "
            "padding."
        )
        findings.section("Cost of pre-training, and of the paper's runs", text)
        del timed, first, second
        free_memory(settings)


def _largest_that_fits(name: str, settings: Settings) -> Timed:
    """The paper's update in one piece, or half, or a quarter..."""
    utterances, length = (1, 4.0) if settings.toy else (64, 12.5)
    while True:
        try:
            with tempfile.TemporaryDirectory() as folder:
                where = (settings.device, precision(settings), Path(folder))
                return Timed(name, resident(utterances, length, settings), *where)
        except RuntimeError as error:
            if utterances == 1 or not pretrain_step.is_out_of_memory(error):
                raise
        utterances //= 2
        free_memory(settings)


def free_memory(settings: Settings) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()


def resident(utterances: int, length: float, settings: Settings) -> list[Tensor]:
    """A batch on the device."""
    generator = torch.Generator().manual_seed(0)
    return [(0.1 * torch.randn(utterances, round(length * RATE), generator=generator)).to(settings.device)]


# ---------------------------------------------------------------- kernels


def trace(settings: Settings, findings: Findings, seconds: float) -> None:
    """The kernels that a step of each method spends its time in."""
    names = ("bestrq_small", "wav2vec2_small") if settings.toy else ("bestrq", "wav2vec2")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            contender = Ours(name, settings.device, precision(settings), Path(folder))
            contender.start(resident(*((1, 2.0) if settings.toy else (32, 12.5)), settings))
            taken = [pretrain_step.run_block(contender, settings.device) for _ in range(5)]
            usual = statistics.median(taken[2:])
            rows = top_kernels(contender, settings.device)
            idle = pretrain_step.trace(contender, settings.device, usual) if settings.device == "cuda" else None
        told = "" if idle is None else f"{idle[0]:.0f} kernels a step, {idle[1]:.0%} of the time idle; "
        table = markdown_table(("kernel", "in a step", "ms", "share"), rows)
        findings.section(f"Where a step's time goes: {name}.yaml", f"{told}by {settings.device} time.\n\n{table}")
        findings.figures[f"trace {name}"] = {"kernels": rows, "idle": idle}
        findings.row(f"{name}, trace", told + ", then ".join(f"{row[0][:50]} {row[3]}" for row in rows[:2]))
        del contender
        free_memory(settings)


def top_kernels(contender: Contender, device: str) -> list[tuple[str, str, str, str]]:
    """Name, number, milliseconds and share of the most expensive kernels of a block; operators on a CPU."""
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        pretrain_step.run_block(contender, device)
    events = [
        (one.key, one.count, one.self_device_time_total if cuda else one.self_cpu_time_total)
        for one in profiled.key_averages()
    ]
    total = sum(time for _, _, time in events) or 1.0
    events.sort(key=lambda one: -one[2])
    return [
        (" ".join(name.split())[:90], f"{count}", f"{time / 1e3:.2f}", f"{time / total:.1%}")
        for name, count, time in events[:LISTED]
    ]


def kernels(settings: Settings, findings: Findings, seconds: float) -> None:
    """Which kernels of attention and of the depthwise convolution are the fastest."""
    attention(settings, findings)
    convolution(settings, findings)


def convolution(settings: Settings, findings: Findings) -> None:
    """Both ways of the encoder's depthwise convolution, at its sizes, forward and backward."""
    for dtype in [torch.float32] if settings.toy else [torch.bfloat16, torch.float16]:
        _convolution_in(dtype, settings, findings)


def _convolution_in(dtype: torch.dtype, settings: Settings, findings: Findings) -> None:
    batch, frames, channels = (1, 50, 64) if settings.toy else (64, 312, 576)
    layer = FrameConvolution(channels, 31, groups=channels).to(settings.device, dtype)
    x = torch.randn(batch, frames, channels, device=settings.device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)
    ways = {
        "channel by channel": lambda: nn.Conv1d.forward(layer, x.mT).mT,
        "as images": lambda: layer.convolve_image(x),
    }
    times = {
        name: _milliseconds(lambda convolve=convolve: convolve().backward(gradient), None, settings.device)
        for name, convolve in ways.items()
    }
    chosen = _milliseconds(lambda: layer(x).backward(gradient), None, settings.device)
    kind = str(dtype).removeprefix("torch.")
    findings.figures[f"convolution in {kind}"] = {**times, "chosen": chosen}
    told = ", ".join(f"{name} {_told(one)}" for name, one in times.items())
    findings.row(f"depthwise convolution in {kind}, forward and backward", f"{told}; chosen {_told(chosen)}")
    findings.section(
        f"Depthwise convolution in {kind}",
        f"Forward and backward of {batch} x {frames} frames x {channels}, 31 wide, {dtype}: {told}; chosen "
        f"{_told(chosen)}.",
    )


def attention(settings: Settings, findings: Findings) -> None:
    """Which attention kernel is the fastest at the encoder's sizes: 300 frames, 64-wide heads, forward and backward."""
    batch, heads, frames = (1, 2, 50) if settings.toy else (128, 9, 300)  # long enough not to time the launches
    dtype = torch.float32 if settings.toy else torch.bfloat16
    shape = (batch, heads, frames, 64)
    query, key, value = (torch.randn(shape, device=settings.device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(query)
    bias = torch.randn(batch, heads, frames, frames, device=settings.device, dtype=dtype, requires_grad=True)
    backends = {
        "chosen": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    cases = {"rotary": (None, 0.1), "rotary, no dropout": (None, 0.0), "relative": (bias, 0.1)}
    cases["relative, no dropout"] = (bias, 0.0)
    rows, figures = [], {}
    for case, (mask, dropout) in cases.items():

        def compute(attention: Callable[..., Tensor], mask: Tensor | None = mask, dropout: float = dropout) -> None:
            output = attention(query, key, value, mask, dropout)
            torch.autograd.grad(output, [query, key, value] if mask is None else [query, key, value, mask], gradient)

        times = {
            name: _milliseconds(
                partial(compute, attend if backend is None else scaled_dot_product_attention), backend, settings.device
            )
            for name, backend in backends.items()
        }
        figures[case] = times
        rows.append((case, *("-" if one is None else f"{one:.3f}" for one in times.values())))
        ran = {name: one for name, one in times.items() if one is not None and name != "chosen"}
        if ran:
            best = min(ran, key=ran.__getitem__)
            findings.row(f"attention, {case}", f"fastest {best}, {ran[best]:.3f} ms; chosen {_told(times['chosen'])}")
    findings.figures["attention"] = figures
    findings.section(
        "Attention kernels",
        f"Forward and backward, ms, of {batch} x {heads} heads x {frames} frames x 64, {dtype}, cuDNN "
        f"{torch.backends.cudnn.version()}; - where a kernel does not do it.\n\n"
        f"{markdown_table(('case', *backends), rows)}",
    )


def _told(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.3f} ms"


def _milliseconds(compute: Callable[[], None], backend: SDPBackend | None, device: str) -> float | None:
    """Median of twenty runs; None where the kernel does not do it."""
    try:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            compute()
            wait(device)
            timer = Timer("compute()", globals={"compute": compute}, num_threads=torch.get_num_threads())
            return 1e3 * statistics.median(timer.timeit(5).mean for _ in range(4))
    except RuntimeError:
        return None
