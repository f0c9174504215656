"""What the stages of a plan will cost, from a short warm-up of each pre-training on noise."""

import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from hyperpyyaml import load_hyperpyyaml

from speechbrain_bestrq.corpora import AUDIO_EXTENSIONS
from speechbrain_bestrq.corpora._audio_files import walk_files
from speechbrain_bestrq.pretraining_model import PretrainingModel
from speechbrain_bestrq.reproduction.plan import CODEBOOK_CHECK, yaml_value
from speechbrain_bestrq.reproduction.stages import Stage

#: Seconds of the warm-up's batch, at most those of a run's own.
WARM_UP_SECONDS = 20.0
#: Seconds of noise that statistics are measured on: more frames than any codebook has codes.
STATISTICS_SECONDS = 400.0
#: Steps that are timed after one that is not; the median counts.
WARM_UP_STEPS = 3
#: Audio files whose headers are read to tell the hours of a corpus.
SAMPLE = 200
#: Options of a pre-training that do not change how fast a step is.
NO_MATTER = {
    "--output_folder",
    "--data_folder",
    "--optimizer_step_limit",
    "--encoder_at_steps",
    "--mask_prob",
    "--seed",
}
#: Folds of the recipe of emotions, each a run.
FOLDS = {"speaker": 10, "session": 5}
#: Bytes of a parameter: alone, and with a step of AdamW and its two moments in a checkpoint.
ENCODER_BYTES, CHECKPOINT_BYTES = 4, 12
#: Checkpoints that a run keeps at most.
CHECKPOINTS = 3


@dataclass(frozen=True)
class Cost:
    """Of a stage."""

    device_hours: float
    gigabytes: float
    """On the disk."""
    whole: bool = True
    """False: the encoder's part only; the head's comes on top."""


@dataclass(frozen=True)
class Speed:
    """What a warm-up found, audio-seconds a second on one device, and the sizes that go with it."""

    training: float
    encoding: float
    parameters: int
    state_bytes: float
    """Of all hidden states of a second of audio, in fp32."""


def estimate(stages: Sequence[Stage]) -> dict[str, Cost]:
    """Estimate the stages that train something.

    Arguments
    ---------
    stages : sequence of Stage
        Of a plan.

    Returns
    -------
    dict
        By stage. Those that make speech or look at labels are missing, minutes each, and those on
        corpora that are not there yet.
    """
    speeds: dict[str, Speed] = {}
    measured: dict[str, Speed] = {}
    hours: dict[tuple[Path, ...], float] = {}
    caches: set[str | None] = set()
    costs = {}
    for stage in stages:
        if stage.kind in ("speech", CODEBOOK_CHECK):
            continue
        words = list(stage.command)
        place = next(number for number, word in enumerate(words) if word.endswith("train.py"))
        path, options = Path(words[place + 1]), dict(zip(words[place + 3 :: 2], words[place + 4 :: 2], strict=True))
        if stage.kind in ("pretraining", "masking"):
            key = json.dumps([str(path), {name: value for name, value in options.items() if name not in NO_MATTER}])
            if key not in measured:
                measured[key] = warm_up(path, options)
            speeds[stage.name] = measured[key]
            costs[stage.name] = _pretraining(path, options, measured[key], stage.devices)
            continue
        if not Path(options["--data_folder"]).is_dir():
            continue
        folders = _folders(path, options)
        if folders not in hours:
            hours[folders] = sum(corpus_hours(one) for one in folders)
        speed = next((speeds[name] for name in stage.needs if name in speeds), None)
        cache = options.get("--cache_folder")
        if cache is not None and cache in caches:  # of another seed: computed already
            speed = None
        caches.add(cache)
        costs[stage.name] = _probe(path, options, speed, hours[folders])
    return costs


def _value(path: Path, options: dict[str, str], key: str) -> Any:
    """A plain value of a YAML, or what the command gives instead."""
    if f"--{key}" in options:
        return yaml.safe_load(options[f"--{key}"])
    return yaml_value(path, key)


def _folders(path: Path, options: dict[str, str]) -> tuple[Path, ...]:
    """Where the audio of a task lies: in its splits, if the recipe names some."""
    folder = Path(options["--data_folder"])
    if turns := sorted(folder.glob("Session*/sentences/wav")):  # IEMOCAP has the dialogues as a whole, too
        return tuple(turns)
    splits = [_value(path, options, f"{name}_splits") or [] for name in ("train", "valid", "test")]
    return tuple(folder / split for split in sorted(set(sum(splits, [])))) or (folder,)


def _pretraining(path: Path, options: dict[str, str], speed: Speed, devices: int) -> Cost:
    micro_batches = devices * _value(path, options, "grad_accumulation_factor")
    update_seconds = micro_batches * _value(path, options, "max_batch_seconds")
    updates = _value(path, options, "optimizer_step_limit")
    encoders = len(_value(path, options, "encoder_at_steps")) + 1
    size = speed.parameters * (CHECKPOINTS * CHECKPOINT_BYTES + encoders * ENCODER_BYTES)
    return Cost(updates * update_seconds / speed.training / 3600, size / 1e9)


def _probe(path: Path, options: dict[str, str], speed: Speed | None, hours: float) -> Cost:
    if speed is None:  # filter banks, or hidden states that are there
        return Cost(0.0, 0.0, whole=False)
    cached = bool(_value(path, options, "cache_features"))
    folds = FOLDS.get(_value(path, options, "folds"), 1)
    epochs = 1 if cached else folds * _value(path, options, "number_of_epochs")
    trained = _value(path, options, "encoder_start_update") is not None
    seconds = hours * 3600 * epochs / (speed.training if trained else speed.encoding)
    size = hours * 3600 * speed.state_bytes if cached else 0.0
    return Cost(seconds / 3600, size / 1e9, whole=False)


def warm_up(path: Path, options: dict[str, str]) -> Speed:
    """Take a few steps of a pre-training on noise, on a GPU if there is one.

    Arguments
    ---------
    path : Path
        Its YAML.
    options : dict
        What the command gives, "--key" to text.

    Returns
    -------
    Speed
    """
    given = {key.removeprefix("--"): yaml.safe_load(value) for key, value in options.items()}
    with (
        open(path, encoding="utf-8") as file,
        tempfile.TemporaryDirectory() as folder,
    ):  # the YAML's objects make folders
        hparams = load_hyperpyyaml(file, {**given, "data_folder": folder, "output_folder": folder})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: PretrainingModel = hparams["model"].to(device)
    generator = torch.Generator().manual_seed(0)
    seconds = min(WARM_UP_SECONDS, float(hparams["max_batch_seconds"]))
    wavs = (0.1 * torch.randn(2, round(seconds / 2 * hparams["sample_rate"]), generator=generator)).to(device)
    if not model.measured:
        model.measure([(wavs, None)] * math.ceil(STATISTICS_SECONDS / seconds))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(hparams["precision"])
    context = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

    def train() -> None:
        with context:
            loss = model(wavs, None).loss
        loss.backward()
        model.zero_grad()

    states = []

    def encode() -> None:
        with context, torch.no_grad():
            states[:] = [model.speech_encoder(wavs)[0]]

    model.train()
    training = seconds / _median_seconds(train, device)
    model.eval()
    encoding = seconds / _median_seconds(encode, device)
    parameters = sum(one.numel() for one in model.parameters())
    return Speed(training, encoding, parameters, 4 * states[0].numel() / seconds)


def _median_seconds(step: Callable[[], None], device: torch.device) -> float:
    taken = []
    for _ in range(1 + WARM_UP_STEPS):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def corpus_hours(folder: Path) -> float:
    """Hours of the audio in a folder: the number of its files times the mean of some of them.

    Arguments
    ---------
    folder : Path

    Returns
    -------
    float
        0 where there is none.
    """
    found = (folder / relative for relative, _ in walk_files(folder)) if folder.is_dir() else ()
    paths = [path for path in found if path.suffix.lower().lstrip(".") in AUDIO_EXTENSIONS]
    if not paths:
        return 0.0
    some = random.Random(0).sample(paths, min(SAMPLE, len(paths)))
    seconds = statistics.fmean(soundfile.info(path).duration for path in some)
    return len(paths) * seconds / 3600


def cost_table(stages: Sequence[Stage], costs: dict[str, Cost]) -> str:
    """Tell the costs in lines, with their sum.

    Arguments
    ---------
    stages : sequence of Stage
    costs : dict
        As :func:`estimate` gives them.

    Returns
    -------
    str
    """
    lines = [f"{'device-hours':>12} {'GB':>8}  stage"]
    for stage in stages:
        if stage.name not in costs:
            lines.append(f"{'?':>12} {'?':>8}  {stage.name}")
            continue
        cost = costs[stage.name]
        more = "" if cost.whole else " + head"
        lines.append(f"{cost.device_hours:>12.2f} {cost.gigabytes:>8.2f}  {stage.name}{more}")
    hours, size = sum(one.device_hours for one in costs.values()), sum(one.gigabytes for one in costs.values())
    unknown = len(stages) - len(costs)
    more = f" and the {unknown} stages marked ?" if unknown else ""
    lines.append(f"{hours:>12.2f} {size:>8.2f}  in all, without the heads{more}, by a warm-up on this machine")
    return "\n".join(lines)
