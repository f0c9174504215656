"""Memory and time of wav2vec 2.0's quantizer and contrastive loss, against SpeechBrain's.

    python benchmarks/wav2vec2_loss.py
    python benchmarks/wav2vec2_loss.py --device cuda

Both go forward and backward over the same masked frames: features to targets with the diversity loss (quantizer), and
predictions and targets to the contrastive loss (loss), with SpeechBrain's drawing of distractors and ours. Their runs
alternate, so that whatever else the machine does falls on both alike. Extra memory is the peak of one run over what
was held before it, each in a fresh process. One Markdown table goes to the standard output; nothing is written.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from speechbrain.lobes.models.wav2vec import W2VTargetQuantiser
from speechbrain.lobes.models.wav2vec import sample_negatives as speechbrain_negatives
from speechbrain.nnet.losses import ContrastiveLoss
from torch import nn

from speechbrain_bestrq.contrastive import contrastive_loss, sample_negatives
from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer, mean_shares, perplexity
from speechbrain_bestrq.machine import describe_machine
from speechbrain_bestrq.masking import MaskedFrames

#: The base model's sizes: features, targets, codes in each of two groups, distractors, temperature of the cosines.
FEATURES, TARGETS, CODES, NEGATIVES, TEMPERATURE = 512, 256, 320, 100, 0.1
OURS, THEIRS = "speechbrain_bestrq", "SpeechBrain"
PARTS = ("quantizer", "loss")


def mask_half(utterances: int, frames: int) -> MaskedFrames:
    """Mask so many frames in all, half of each utterance."""
    each = frames // utterances
    mask = torch.zeros(utterances, 2 * each, dtype=torch.bool)
    mask[:, ::2] = True
    return MaskedFrames.from_mask(mask)


def build(name: str, part: str, utterances: int, frames: int, device: str) -> Callable[[], None]:
    """Build what goes forward and backward once."""
    generator = torch.Generator().manual_seed(0)
    masked = mask_half(utterances, frames)
    masked = masked._replace(mask=masked.mask.to(device), indices=masked.indices.to(device))
    features, predictions, targets = (
        torch.randn(masked.count, size, generator=generator).to(device).requires_grad_()
        for size in (FEATURES, TARGETS, TARGETS)
    )
    if name == OURS:
        quantizer = GumbelQuantizer(FEATURES, TARGETS, CODES).to(device)
        head = nn.Linear(TARGETS, TARGETS).to(device)
        codes = torch.randint(CODES, (masked.count, 2), generator=generator).to(device)
        real = masked.indices >= 0

        def quantize() -> None:
            quantized = quantizer(features)
            diversity = perplexity(mean_shares(quantized.probabilities, real))
            (head(quantized.vectors).sum() + diversity).backward()

        def compare() -> None:
            negatives = sample_negatives(masked, NEGATIVES)
            contrastive_loss(predictions, targets, codes, negatives, masked, TEMPERATURE).loss.backward()

    else:
        theirs, loss = W2VTargetQuantiser(FEATURES, TARGETS, num_vars=CODES).to(device), ContrastiveLoss(TEMPERATURE)
        by_utterance = (utterances, masked.count // utterances, -1)

        def quantize() -> None:
            vectors, facts = theirs(features.view(by_utterance))
            (vectors.sum() + facts["diversity_loss"]).backward()

        def compare() -> None:
            given = targets.view(by_utterance)
            loss(predictions.view(by_utterance), given, speechbrain_negatives(given, NEGATIVES))[0].backward()

    return {"quantizer": quantize, "loss": compare}[part]


def resident_megabytes(field: str) -> float:
    """Read a field of /proc/self/status that is given in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def extra_megabytes(name: str, part: str, utterances: int, frames: int, device: str) -> float:
    """Peak memory of one run over what was held before; to be called in a fresh process."""
    # a run of few frames first loads libraries and makes work spaces that are no contender's own
    build(name, part, utterances, 4 * utterances, device)()
    run = build(name, part, utterances, frames, device)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far (of importing) is forgotten
    before = resident_megabytes("VmRSS")
    run()
    return resident_megabytes("VmHWM") - before


def measure_memory(*arguments: str | int) -> float:
    """Run :func:`extra_megabytes` in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(extra_megabytes, arguments)


def measure_time(arguments: argparse.Namespace, part: str) -> dict[str, list[float]]:
    """Time both in turns: seconds of each repeat."""
    runs = {
        name: build(name, part, arguments.utterances, arguments.frames, arguments.device) for name in (THEIRS, OURS)
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(arguments.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(arguments: argparse.Namespace) -> str:
    """Measure, and put the result into Markdown."""
    lines = [
        f"{arguments.frames} masked frames in {arguments.utterances} utterances, 2 x {CODES} codes, {NEGATIVES} "
        f"distractors, forward and backward, fp32; {arguments.repeats} repeats in turns; "
        f"{describe_machine(arguments.device)}",
        "",
        "| part | whose | median, ms | fastest - slowest, ms | extra memory, MB |",
        "|---|---|---|---|---|",
    ]
    sums = {name: [0.0, 0.0] for name in (THEIRS, OURS)}
    ratios = []
    for part in PARTS:
        seconds = measure_time(arguments, part)
        values = {}
        for name, times in seconds.items():
            memory = measure_memory(name, part, arguments.utterances, arguments.frames, arguments.device)
            values[name] = (statistics.median(times), memory)
            sums[name] = [a + b for a, b in zip(sums[name], values[name], strict=True)]
            spread = f"{1e3 * min(times):.1f} - {1e3 * max(times):.1f}"
            lines.append(f"| {part} | {name} | {1e3 * values[name][0]:.1f} | {spread} | {memory:.1f} |")
        ratios.append((part, values))
    ratios.append(("both", sums))
    lines.append("")
    for part, values in ratios:
        faster, smaller = (a / max(b, 1e-9) for a, b in zip(values[THEIRS], values[OURS], strict=True))
        lines.append(f"{part}: {faster:.1f} times the speed, {smaller:.1f} times less memory.")
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1600, help="masked frames in all (%(default)s)")
    parser.add_argument("--utterances", type=int, default=4, help="that they are of (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (%(default)s)")
    arguments = parser.parse_args(words)
    if arguments.utterances < 1 or arguments.repeats < 1 or arguments.frames < 4 * arguments.utterances:
        parser.error("give at least one utterance, four frames for each, and one repeat.")
    if arguments.frames % arguments.utterances:
        parser.error(f"--frames must be a multiple of --utterances: SpeechBrain's need {arguments.utterances} alike.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; take --device cpu.")
    print(table(arguments), end="")


if __name__ == "__main__":
    main()
