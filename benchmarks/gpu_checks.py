"""Parts of gpu_session.py that check: equal to a CPU, and every recipe runs."""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import RATE
from contenders import BESTRQ, HEADS, WAV2VEC2, Ours
from gpu_findings import REPOSITORY, Findings, Outcome, Settings, run_command
from noise_corpora import noise, write_corpus
from torch import Tensor, nn

from speechbrain_bestrq.accounting import JsonLines
from speechbrain_bestrq.attention import attend
from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.contrastive import sample_negatives
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.masking import MaskedFrames
from speechbrain_bestrq.precision import full_precision
from speechbrain_bestrq.results import RESULTS_FILE
from speechbrain_bestrq.wav2vec2 import Wav2Vec2

RECIPES = REPOSITORY / "recipes"
#: Sizes of the rehearsal's models.
TOY_SIZES = {
    "bestrq": {**BESTRQ["small"], "num_heads": HEADS["small"]["rotary"]},
    "wav2vec2": WAV2VEC2["small"],
}
#: Recipes that use an encoder: the folder, the layout of its data, and what keeps it short.
DOWNSTREAM = {
    "LibriSpeech/ASR": ("librispeech", ["--test_splits=[test-clean]"]),
    "VoxCeleb/verification": ("voxceleb", ["--valid_trials=20"]),
    "IEMOCAP/emotion": ("iemocap", ["--fold=Ses01F"]),
    "SLURP/intent": ("slurp", []),
}
#: And one that trains the encoder too, on speech that is perturbed.
FINE_TUNED = "LibriSpeech/ASR"
#: Labels of two devices agree on so many frames, and differ only where two codes are so near.
LEAST_EQUAL, NEAR_TIE = 0.9999, 1e-5
#: How far losses, and gradients as vectors, may be apart, as a share.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
#: The same of hidden states under bf16, whose products have a precision of 2^-8.
BF16_TOLERANCE = 0.05
#: Of attention's weights in training, and how far a share may be off: 1/16 and 2/16 are further.
DROPOUT, DROPOUT_TOLERANCE = 0.1, 0.015
#: Seconds that a layer takes to be compiled and compared.
COMPILE_SECONDS = 25
UPDATES = 6


def sizes(name: str, settings: Settings) -> dict[str, int]:
    """What differs from the YAML."""
    return TOY_SIZES[name] if settings.toy else {}


# ---------------------------------------------------------------- equal to a CPU


def equality(settings: Settings, findings: Findings, seconds: float) -> None:
    """Compare labels as training computes them, and losses and gradients in float32."""
    ends = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        models = {
            name: Ours(name, "cpu", "fp32", Path(folder), False, sizes(name, settings)).model for name in TOY_SIZES
        }
    compare_labels(models["bestrq"], settings, findings)
    compare_attention(settings, findings)
    for name, model in models.items():
        compare_losses(name, model, settings, findings)
        compare_padded(name, model.speech_encoder, settings, findings)
    with_relative = copy.deepcopy(models["bestrq"].speech_encoder)
    with_relative.encoder = ConformerEncoder(**{**with_relative.encoder.config, "attention": "relative"})
    compare_padded("bestrq with relative positions", with_relative, settings, findings)
    if settings.toy:  # on a CPU it takes minutes
        return
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        findings.row("compiled layers", "left out: --compile needs a C compiler, and there is none")
        return
    for name, model in models.items():
        if ends - time.monotonic() < COMPILE_SECONDS:
            findings.row(f"{name}: a compiled layer as an eager one", "left out: the time is over")
        else:
            compare_compiled(name, model, settings, findings)


def compare_labels(model: BestRQ, settings: Settings, findings: Findings) -> None:
    """Labels under bf16 autocast on the device against those on the CPU, of statistics measured on that audio."""
    utterances, length = (4, 3.0) if settings.toy else (64, 12.5)
    waves = [noise(np.random.default_rng(number), round(length * RATE)) for number in range(utterances)]
    wavs = torch.from_numpy(np.stack(waves))
    with torch.no_grad():
        model.speech_encoder.frontend.measure([(wavs, None)])
        stacked = _frames(model, wavs)
        model.quantizer.fit([stacked])
        expected = model.quantizer.label(stacked)
        on_device = copy.deepcopy(model).to(settings.device)
        with torch.autocast(settings.device, dtype=torch.bfloat16):
            found = on_device.quantizer.label(_frames(on_device, wavs.to(settings.device))).cpu()
        apart = (found != expected)[..., 0]
        gaps = _gaps(model, stacked[apart], expected[apart][:, 0], found[apart][:, 0])
    share, gap = 1 - float(apart.double().mean()), float(gaps.max()) if len(gaps) else 0.0
    findings.figures["labels"] = {"frames": apart.numel(), "equal": share, "widest_gap": gap}
    findings.row(
        "labels as on a CPU",
        f"{apart.numel()} frames, {share:.4%} equal, {int(expected.unique().numel())} codes; "
        f"products of the others' two codes at most {gap:.1e} apart",
        share >= LEAST_EQUAL and gap <= NEAR_TIE,
    )


def _frames(model: BestRQ, wavs: Tensor) -> Tensor:
    """What the quantizer labels, shape (B, T, D)."""
    features, _ = model.speech_encoder.frontend(wavs)
    return model.quantizer.prepare(features.unflatten(1, (-1, model.speech_encoder.subsampling.factor)).flatten(2))


def _gaps(model: BestRQ, frames: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """How far the products of frames (K, D) with two codes are apart, in float64."""
    quantizer = model.quantizer
    projected = frames.double() @ quantizer.projection[0].double() - quantizer.offset[0].double()
    projected = nn.functional.normalize(projected, dim=-1)
    codes = quantizer.codebooks[0].double()
    return ((projected * codes[first]).sum(-1) - (projected * codes[second]).sum(-1)).abs()


def compare_losses(name: str, model: BestRQ | Wav2Vec2, settings: Settings, findings: Findings) -> None:
    """Loss and gradient of a batch with the same mask and noise, without dropout."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    generator = torch.Generator().manual_seed(0)
    wavs = torch.from_numpy(np.stack([noise(np.random.default_rng(number), 4 * RATE) for number in range(2)]))
    frames = model.speech_encoder.num_frames(wavs.shape[1])
    mask = model.masking(torch.full((2,), frames), frames, generator).mask
    masked = MaskedFrames.from_mask(mask)
    if isinstance(model, BestRQ):
        filler = (2, frames * model.speech_encoder.subsampling.factor, model.speech_encoder.frontend.num_mels)
        drawn = {"noise": model.noise_deviation * torch.randn(filler, generator=generator)}
    else:
        drawn = {
            "negatives": sample_negatives(masked, model.num_negatives, generator),
            "gumbel": model.quantizer.draw_noise(masked.count, generator),
        }
    losses, gradients = [], []
    for device in ("cpu", settings.device):
        one = copy.deepcopy(model).to(device)
        with full_precision(device):
            given = {key: value.to(device) for key, value in drawn.items()}
            loss = one(wavs.to(device), mask=mask.to(device), **given).loss
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu().double() for p in one.parameters() if p.grad is not None]))
    loss_difference = abs(losses[1] / losses[0] - 1)
    gradient_difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    findings.figures[f"{name} losses"] = {"losses": losses, "gradients_apart": gradient_difference}
    findings.row(
        f"{name}: fp32 loss as on a CPU",
        f"{losses[0]:.5f}, apart by {loss_difference:.1e} of it, gradients by {gradient_difference:.1e}",
        loss_difference <= LOSS_TOLERANCE and gradient_difference <= GRADIENT_TOLERANCE,
    )


def compare_attention(settings: Settings, findings: Findings) -> None:
    """Attention as training computes it, in bfloat16: its dropout, and its gradients where kernels have failed.

    Some of cuDNN's round dropout to a multiple of 1/16, and give gradients that are no numbers where 64 keys are left
    over from blocks of 128 and all scores are low (PyTorch 174245 and 196678).
    """
    kind = torch.float32 if settings.toy else torch.bfloat16
    there = {"device": settings.device, "dtype": kind}
    batch, heads, keys = (2, 4, 64) if settings.toy else (16, 9, 64)
    even = torch.zeros(batch, heads, keys, 64, **there)
    weights = attend(even, even, torch.eye(keys, **there).expand_as(even), dropout_p=DROPOUT).float()
    dropped, mean = float((weights == 0).double().mean()), float(weights.mean()) * keys
    generator = torch.Generator().manual_seed(0)
    frames = 192
    query, key, value, given = (torch.randn(1, 2, frames, 64, generator=generator) for _ in range(4))
    # scores near -120, shared out so that what bfloat16 rounds off one is not 120 times as much on the other's gradient
    query[..., 0], key[..., 0] = 31.0, -31.0
    apart = []
    for mask in (None, torch.ones(1, 1, frames, frames, dtype=torch.bool).tril()):
        gradients = []
        for device, dtype in (("cpu", torch.float32), (settings.device, kind)):
            *ones, gradient = (one.to(kind).to(device, dtype) for one in (query, key, value, given))
            ones = [one.clone().requires_grad_() for one in ones]
            output = attend(*ones, attn_mask=None if mask is None else mask.to(device))
            output.backward(gradient)
            gradients.append(torch.cat([one.grad.flatten().cpu().double() for one in ones]))
        difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
        apart.append(difference if math.isfinite(difference) else math.inf)
    findings.figures["attention in training"] = {"dropped": dropped, "mean_weight": mean, "gradients_apart": apart}
    findings.row(
        "attention under bf16 in training",
        f"{dropped:.2%} of the weights dropped of {DROPOUT:.0%}, their mean {mean:.3f} of what it should be; gradients "
        f"apart by {apart[0]:.1e}, with a mask {apart[1]:.1e}",
        max(abs(dropped - DROPOUT), abs(mean - 1)) <= DROPOUT_TOLERANCE and max(apart) <= BF16_TOLERANCE,
    )


def compare_padded(name: str, encoder: SpeechEncoder, settings: Settings, findings: Findings) -> None:
    """Hidden states of a padded batch under bf16 autocast on the device against those in float32 on the CPU.

    Attention chooses other kernels where there is a mask, and others again without gradients.
    """
    encoder = encoder.eval()
    waves = [
        noise(np.random.default_rng(number), round(length * RATE)) for number, length in enumerate((6.0, 4.3, 1.1))
    ]
    wavs = nn.utils.rnn.pad_sequence([torch.from_numpy(one) for one in waves], batch_first=True)
    lengths = torch.tensor([len(one) / wavs.shape[1] for one in waves])
    with torch.no_grad():
        expected, frames = encoder(wavs, lengths)
    one = copy.deepcopy(encoder).to(settings.device)
    rows = []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), torch.autocast(settings.device, dtype=torch.bfloat16):
            found = one(wavs.to(settings.device), lengths.to(settings.device))[0][-1].detach().float().cpu()
        rows.append(float((found - expected[-1]).norm() / expected[-1].norm()))
        is_zero = not any(found[row, int(count) :].any() for row, count in enumerate(frames))
        rows[-1] = rows[-1] if is_zero else math.inf
    findings.figures[f"{name} padded"] = rows
    findings.row(
        f"{name}: a padded batch under bf16 as on a CPU",
        f"apart by {rows[0]:.1e} without gradients, {rows[1]:.1e} with",
        max(rows) <= BF16_TOLERANCE,
    )


def compare_compiled(
    name: str, model: BestRQ | Wav2Vec2, settings: Settings, findings: Findings, backend: str = "inductor"
) -> None:
    """Output and gradients of a layer as --compile makes it, in float32, against the eager one."""
    layer = copy.deepcopy(model.speech_encoder.encoder.layers[0]).to(settings.device).eval()
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(2, 300, model.speech_encoder.encoder.d_model, generator=generator).to(settings.device)
    results = []
    with full_precision(settings.device):
        for one in (layer, torch.compile(layer, backend=backend, dynamic=False)):
            layer.zero_grad()
            heard = given.clone().requires_grad_()
            output = one(heard)
            output.square().mean().backward()
            gradients = [
                heard.grad,
                *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None),
            ]
            results.append([output.detach().double(), torch.cat([grad.flatten().double() for grad in gradients])])
    apart = [float((ours - eager).norm() / eager.norm()) for eager, ours in zip(*results, strict=True)]
    findings.figures[f"{name} compiled"] = dict(zip(("output_apart", "gradients_apart"), apart, strict=True))
    findings.row(
        f"{name}: a compiled layer as an eager one",
        f"output apart by {apart[0]:.1e} of it, gradients by {apart[1]:.1e}",
        apart[0] <= LOSS_TOLERANCE and apart[1] <= GRADIENT_TOLERANCE,
    )


# ---------------------------------------------------------------- recipes


def command(recipe: str, name: str, settings: Settings, *more: str, launcher: Sequence[str] = ()) -> list[str]:
    """The command of a recipe's YAML; run in the recipe's folder."""
    device = ["--device=cpu"] if settings.device == "cpu" else []
    return [sys.executable, *launcher, "train.py", f"hparams/{name}.yaml", "--noprogressbar", *device, *more]


def pretraining_command(
    name: str, settings: Settings, folder: Path, precision: str, *more: str, launcher: Sequence[str] = ()
) -> list[str]:
    """A pre-training of a few updates on noise."""
    given = {
        "data_folder": Path(settings.work) / "noise",
        "max_batch_seconds": 8 if settings.toy else 100,
        "output_folder": folder,
        "train_splits": "[train-clean-100]",
        "optimizer_step_limit": UPDATES,
        "grad_accumulation_factor": 2,
        "statistics_hours": 0.02,
        "warmup_updates": 2,
        "log_interval": 1,
        "num_workers": 0 if settings.toy else 2,
        "precision": precision,
        **sizes(name, settings),
    }
    latest = {option.split("=")[0]: option for option in [*(f"--{key}={value}" for key, value in given.items()), *more]}
    return command("LibriSpeech/pretrain", name, settings, *latest.values(), launcher=launcher)


def pretraining(settings: Settings, findings: Findings, seconds: float) -> None:
    """Every way to pre-train, on noise: precisions, compiled, under torchrun, stopped and resumed."""
    work, ends = Path(settings.work), time.monotonic() + seconds
    # of other lengths in the validation set: padded batches, and attention with a mask
    size = (0.01, 2, 2.0) if settings.toy else (0.25, 8, 12.5)
    write_corpus(work / "noise", "librispeech", *size, training="train-clean-100")
    # the address, since a machine's own name need not resolve without a network
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    jobs: dict[str, Callable[[], None]] = {}

    def add(title: str, name: str, precision: str, *more: str, launcher: Sequence[str] = ()) -> None:
        folder = work / "runs" / title.replace(" ", "_").replace(",", "")
        words = pretraining_command(name, settings, folder, precision, *more, launcher=launcher)
        jobs[title] = lambda: _tell_run(title, words, folder, settings, findings, ends)

    # two lives one after the other: first
    jobs["bestrq bf16, stopped"] = lambda: _stop_and_resume(settings, findings, ends)
    add("bestrq bf16", "bestrq", "bf16")
    add("wav2vec2 bf16", "wav2vec2", "bf16")
    if settings.device == "cpu":
        findings.row("fp16", "left out: SpeechBrain trains in it on GPUs only")
    else:
        add("bestrq fp16", "bestrq", "fp16")
        add("wav2vec2 fp16", "wav2vec2", "fp16")
    add("bestrq bf16, torchrun", "bestrq", "bf16", launcher=[*torchrun, "--nproc_per_node=1"])
    # two ranks share the GPU, which NCCL does not allow
    shared = ["--distributed_backend=gloo", *(["--device=cuda:0"] if settings.device == "cuda" else [])]
    add("bestrq bf16, two ranks", "bestrq", "bf16", *shared, launcher=[*torchrun, "--nproc_per_node=2"])
    # last, for where one runs after the other, compiling may take all the time; one utterance a batch, so one shape:
    # each is compiled apart
    one_shape = [] if settings.toy else ["--max_batch_seconds=12.5", "--max_seconds=12.5"]
    add("bestrq bf16, compiled", "bestrq", "bf16", "--compile", *one_shape)
    add("wav2vec2 bf16, compiled", "wav2vec2", "bf16", "--compile", *one_shape)
    _run_all(jobs, settings)


def _run_all(jobs: dict[str, Callable[[], None]], settings: Settings) -> None:
    """Several at a time on a GPU: nothing is timed here."""
    with ThreadPoolExecutor(1 if settings.device == "cpu" else len(jobs)) as pool:
        for running in [pool.submit(job) for job in jobs.values()]:
            running.result()


def _tell_run(
    title: str, words: Sequence[str], folder: Path, settings: Settings, findings: Findings, ends: float
) -> None:
    outcome = _run(title, words, "LibriSpeech/pretrain", settings, ends)
    lines = _train_lines(folder)
    if outcome.status != 0 or not lines:
        findings.row(title, outcome.failure(), False)
        return
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines]  # JSON has no NaN
    skipped = lines[-1]["skipped_updates"]
    findings.row(
        title,
        f"{lines[-1]['step']} updates, loss {losses[0]:.3f} to {losses[-1]:.3f}, {skipped} skipped, "
        f"peak {lines[-1]['peak_memory_gb']:.1f} GB, {outcome.seconds:.0f} s in all",
        lines[-1]["step"] == UPDATES
        # in fp16 updates are skipped until the scale of the loss fits
        and all(map(math.isfinite, losses[-1:] if "fp16" in title else losses))
        and skipped < UPDATES - 1
        and (folder / "encoder/model.safetensors").is_file(),
    )


def _run(title: str, words: Sequence[str], recipe: str, settings: Settings, ends: float, **options) -> Outcome:
    log = Path(settings.output) / "logs" / f"{title.replace(' ', '_').replace(',', '').replace('/', '_')}.log"
    return run_command(words, RECIPES / recipe, log, ends - time.monotonic(), **options)


def _train_lines(folder: Path) -> list[dict]:
    return [line for line in JsonLines(folder / "train_log.jsonl").read() if line["event"] == "train"]


def _stop_and_resume(settings: Settings, findings: Findings, ends: float) -> None:
    """A run that is asked to stop after its first log line goes on where it was."""
    title, folder = "bestrq bf16, stopped", Path(settings.work) / "runs" / "stopped"

    def stop(process: subprocess.Popen) -> None:
        if not asked and _train_lines(folder):
            asked.append(True)
            process.send_signal(signal.SIGTERM)

    asked: list[bool] = []
    words = pretraining_command("bestrq", settings, folder, "bf16", "--optimizer_step_limit=1000000")
    outcome = _run(title, words, "LibriSpeech/pretrain", settings, ends, watch=stop)
    if outcome.status != 75:
        findings.row("stopped and resumed", outcome.failure(), False)
        return
    before = _train_lines(folder)[-1]["step"]
    words = pretraining_command("bestrq", settings, folder, "bf16", f"--optimizer_step_limit={before + 2}")
    outcome = _run(title, words, "LibriSpeech/pretrain", settings, ends)
    steps = [line["step"] for line in _train_lines(folder)]
    if outcome.status != 0:
        findings.row("stopped and resumed", outcome.failure(), False)
        return
    findings.row(
        "stopped and resumed",
        f"stopped after update {before} with status 75, resumed to {steps[-1]}",
        steps == list(range(1, before + 3)),
    )


def downstream_command(
    recipe: str, settings: Settings, data: Path, encoder: str, folder: Path, fine_tune: bool = False
) -> list[str]:
    """An epoch and a test of a recipe that uses an encoder."""
    more = [f"--data_folder={data}", f"--encoder={encoder}", f"--output_folder={folder}", "--number_of_epochs=1"]
    name = "probe_small" if settings.toy else "bestrq"
    if fine_tune:
        name = "bestrq_finetune"
        more += ["--encoder_rest=0.5", "--encoder_warmup=0.2"]  # both ways of training
    return command(recipe, name, settings, *more, "--num_workers=0", *DOWNSTREAM[recipe][1])


def downstream(settings: Settings, findings: Findings, seconds: float) -> None:
    """Every recipe that uses an encoder, one epoch on noise."""
    work, ends = Path(settings.work), time.monotonic() + seconds
    encoder = next((weights.parent for weights in sorted(work.glob("runs/bestrq*/encoder/model.safetensors"))), None)
    if encoder is None:
        findings.row("recipes", "there is no encoder: the part pretraining did not write one", False)
        return

    data = {
        layout: write_corpus(work / layout, layout, 0.05, None if layout == "iemocap" else 4)
        for layout, _ in DOWNSTREAM.values()
    }

    def try_recipe(recipe: str, fine_tune: bool = False) -> None:
        title = f"{recipe}, fine-tuned" if fine_tune else recipe
        folder = work / "runs" / title.replace(", ", "_")
        words = downstream_command(recipe, settings, data[DOWNSTREAM[recipe][0]], str(encoder), folder, fine_tune)
        outcome = _run(title, words, recipe, settings, ends)
        if outcome.status != 0:
            findings.row(title, outcome.failure(), False)
            return
        tested = any(folder.rglob(RESULTS_FILE))  # of emotion's one fold, in the fold's folder
        findings.row(title, f"{words[2]}: an epoch and a test, {outcome.seconds:.0f} s", tested)

    jobs = {recipe: partial(try_recipe, recipe) for recipe in DOWNSTREAM}
    jobs["fine-tuned"] = partial(try_recipe, FINE_TUNED, True)
    _run_all(jobs, settings)
