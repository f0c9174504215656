"""Share of a downstream step that is spent in the encoder, frozen against fine-tuned.

    python benchmarks/frozen_share.py
    python benchmarks/frozen_share.py --device cuda --source results/bestrq/1000

A step is the forward pass, the backward pass and the update of a CTC head (two linear layers of 1024
over 29 characters) on top of the encoder, as in SpeechBrain's LibriSpeech recipe. The encoder's share is
the step's time less that of the same step on hidden states that are there already. The kinds of
step alternate, so that whatever else the machine does falls on all alike; each is a median. Without
--source the encoder is an untrained one of --d_model and --layers: time does not depend on the weights. One
Markdown table goes to the standard output; nothing is written unless --output names a file.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
from speechbrain_bestrq.machine import describe_machine
from speechbrain_bestrq.pretrained import PretrainedEncoder

#: Samples per second; characters of the head, and of a second of speech.
RATE, CHARACTERS, CHARACTERS_A_SECOND = 16000, 29, 12
HEAD_ONLY = "head alone"


def make_source(d_model: int, layers: int, folder: Path) -> Path:
    """Save an untrained encoder."""
    encoder = ConformerEncoder(d_model, layers, num_heads=max(d_model // 64, 1), d_ffn=4 * d_model)
    speech_encoder = SpeechEncoder(LogMel(normalize="utterance"), ConvSubsampling(d_model=d_model), encoder)
    return save_encoder(speech_encoder, folder / "encoder", "# Untrained")


def kinds_of_step(layers: int) -> dict[str, dict[str, int | bool]]:
    """Name what is compared, with the encoder's options."""
    return {
        "frozen": {"freeze": True},
        f"{layers // 2} of {layers} layers frozen": {"freeze_layers": layers // 2},
        "fine-tuned": {},
    }


class Step:
    """A step of a CTC recipe on one batch; without an encoder, on hidden states."""

    def __init__(self, encoder: PretrainedEncoder | None, inputs: Tensor, d_model: int, autocast: torch.dtype | None):
        device = inputs.device
        self.encoder, self.inputs, self.autocast = encoder, inputs, autocast
        self.head = nn.Sequential(
            nn.Linear(d_model, 1024), nn.LeakyReLU(), nn.Linear(1024, 1024), nn.LeakyReLU(), nn.Linear(1024, CHARACTERS)
        ).to(device)
        parameters = [*self.head.parameters(), *(encoder.parameters() if encoder else ())]
        self.optimizer = torch.optim.AdamW([one for one in parameters if one.requires_grad], 1e-5)
        seconds = inputs.shape[1] / RATE if encoder else inputs.shape[1] / 25
        self.tokens = torch.randint(1, CHARACTERS, (len(inputs), round(CHARACTERS_A_SECOND * seconds)), device=device)

    def __call__(self) -> None:
        """Run it."""
        with torch.autocast(self.inputs.device.type, self.autocast, enabled=self.autocast is not None):
            hidden = self.encoder(self.inputs) if self.encoder else self.inputs
            logits = self.head(hidden)
        batch, frames, _ = logits.shape
        loss = nn.functional.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            self.tokens,
            torch.full((batch,), frames),
            torch.full((batch,), self.tokens.shape[1]),
        )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(arguments: argparse.Namespace, source: str | os.PathLike) -> str:
    """Measure, and put the result into Markdown."""
    device, autocast = arguments.device, torch.bfloat16 if arguments.bf16 else None
    wavs = 0.1 * torch.randn(arguments.batch, round(RATE * arguments.seconds), device=device)
    probe = PretrainedEncoder(source, freeze=True).to(device)
    d_model, layers, hidden = probe.output_dim, probe.num_layers, probe(wavs)
    steps = {HEAD_ONLY: Step(None, hidden, d_model, autocast)}
    for name, options in kinds_of_step(layers).items():
        steps[name] = Step(PretrainedEncoder(source, **options).to(device).train(), wavs, d_model, autocast)
    for step in steps.values():
        step()  # libraries are loaded, the optimizer's state is made
    seconds = {name: [] for name in steps}
    for _ in range(arguments.repeats):
        for name, step in steps.items():
            seconds[name].append(timed(step, device))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    precision = "bf16" if arguments.bf16 else "fp32"
    size = sum(parameter.numel() for parameter in probe.parameters()) / 1e6
    lines = [
        f"A step of {arguments.batch} x {arguments.seconds:g} s; encoder of {size:.1f} million parameters, "
        f"{layers} layers of {d_model}; {precision}; median of {arguments.repeats}, in turns; "
        f"{describe_machine(device)}",
        "",
        "| encoder | step, ms | fastest - slowest, ms | in the encoder, ms | share of the step |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        spent = medians[name] - medians[HEAD_ONLY]
        share = f"{1e3 * spent:.1f} | {100 * spent / medians[name]:.0f} %" if name != HEAD_ONLY else "- | -"
        spread = f"{1e3 * min(times):.1f} - {1e3 * max(times):.1f}"
        lines.append(f"| {name} | {1e3 * medians[name]:.1f} | {spread} | {share} |")
    ratio = medians["fine-tuned"] / medians["frozen"]
    return "\n".join([*lines, "", f"A fine-tuned step takes {ratio:.1f} times a frozen one."]) + "\n"


def main(words: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="an encoder folder, a run's output folder or a hub id (an untrained encoder)")
    parser.add_argument("--d_model", type=int, default=576, help="size of the untrained encoder (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the untrained encoder (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="utterances (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each utterance (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (%(default)s)")
    parser.add_argument("--output", type=Path, help="a new file for the table")
    arguments = parser.parse_args(words)
    for name in ("d_model", "layers", "batch", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(arguments, name)}.")
    if not 0.5 <= arguments.seconds <= 600:
        parser.error(f"--seconds must be from 0.5 to 600, not {arguments.seconds:g}.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; take --device cpu.")
    if arguments.output and arguments.output.exists():
        parser.error(f"--output {arguments.output} exists already: name a new file.")
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output {arguments.output}: the folder does not exist; make it first.")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            source = arguments.source or make_source(arguments.d_model, arguments.layers, Path(scratch))
            text = table(arguments, source)
    except InputError as error:
        parser.error(str(error))
    print(text, end="")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
