"""What the stages of a plan will cost, from a short warm-up of each pre-training and each head on noise."""

import functools
import json
import math
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import soundfile
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_bestrq.artefact import CONFIG_FILE, load_encoder
from speechbrain_bestrq.corpora import AUDIO_EXTENSIONS
from speechbrain_bestrq.corpora._audio_files import walk_files
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.pretraining_model import PretrainingModel
from speechbrain_bestrq.reproduction.elsewhere import encoder_of
from speechbrain_bestrq.reproduction.plan import CODEBOOK_CHECK, TASKS, yaml_value
from speechbrain_bestrq.reproduction.stages import Stage
from speechbrain_bestrq.safe_reading import read_json

#: Seconds of the warm-up's batch, at most those of a run's own.
WARM_UP_SECONDS = 20.0
#: Seconds of noise that statistics are measured on: more frames than any codebook has codes.
STATISTICS_SECONDS = 400.0
#: Steps that are timed after one that is not; the median counts.
WARM_UP_STEPS = 3
#: Audio files whose headers are read to tell the hours of a corpus.
SAMPLE = 200
#: Options that do not change how fast a step is.
NO_MATTER = {
    "--output_folder",
    "--data_folder",
    "--optimizer_step_limit",
    "--encoder_at_steps",
    "--mask_prob",
    "--seed",
    "--encoder",
    "--cache_folder",
    "--number_of_epochs",
    "--label_seed",
    *(f"--{task.few_option}" for task in TASKS.values()),
}
#: Folds of the recipe of emotions, each a run.
FOLDS = {"speaker": 10, "session": 5}
#: Of a probe's warm-up, and labels of its head.
UTTERANCE_SECONDS, LABELS = 5.0, 30
#: Bytes of a parameter: alone, and with a step of AdamW and its two moments in a checkpoint.
ENCODER_BYTES, CHECKPOINT_BYTES = 4, 12
#: For a recipe's program to start and to read its corpus.
START_SECONDS = 10.0
#: Checkpoints that a run keeps at most.
CHECKPOINTS = 3


@dataclass(frozen=True)
class Cost:
    """Of a stage."""

    device_hours: float
    gigabytes: float
    """On the disk."""


@dataclass(frozen=True)
class Speed:
    """What a warm-up found, and the sizes that go with it."""

    training: float
    """Audio-seconds a second of a pre-training on one device."""
    encoding: float
    """Audio-seconds a second of the encoder alone, in float32."""
    fine_tuning: float
    """The same, there and back."""
    parameters: int
    states: tuple[int, int]
    """Number of hidden states, and their channels."""
    frames: float = 25.0
    """Of them in a second."""

    @property
    def state_bytes(self) -> float:
        """Of all hidden states of a second of audio, in fp32."""
        return 4 * self.states[0] * self.states[1] * self.frames


#: Filter banks cost nothing that counts.
FILTERBANK_SPEED = Speed(math.inf, math.inf, math.inf, 0, (1, 320))


def estimate(stages: Sequence[Stage], done: Collection[str] = ()) -> dict[str, Cost]:
    """Estimate the stages that train something.

    Arguments
    ---------
    stages : sequence of Stage
        Of a plan.
    done : collection of str, optional
        Names of those that cost nothing any more.

    Returns
    -------
    dict
        By stage. The done ones are missing, and those that make speech or look at labels, minutes each.
    """
    speeds: dict[str, Speed] = {}
    measured: dict[str, Any] = {}
    made: dict[str, float] = {}
    hours: dict[Path, float] = {}
    caches: set[str | None] = set()
    costs = {}
    needed = {name for stage in stages if stage.name not in done for name in (stage.name, *stage.needs)}

    def measure(what: Callable[..., Any], path: Path, options: dict[str, str], *more: Any) -> Any:
        """What a warm-up finds, once for all stages that differ in nothing that matters."""
        kept = {name: value for name, value in options.items() if name not in NO_MATTER}
        key = json.dumps([str(path), kept, repr(more)])
        if key not in measured:
            measured[key] = what(path, options, *more)
        return measured[key]

    for stage in stages:
        words = list(stage.command)
        if stage.kind == "speech":  # the hours that it will make
            given = dict(zip(words, words[1:], strict=False))
            made[given["--output_folder"]] = float(given["--hours"])
        if stage.kind in ("speech", CODEBOOK_CHECK):
            continue
        if (encoder := encoder_of(stage.command)) is not None:
            if stage.name in needed:
                config = read_json(encoder / CONFIG_FILE)
                architecture = json.dumps({name: config[name] for name in config if name != "training"})
                if architecture not in measured:
                    measured[architecture] = warm_up_encoder(encoder)
                speeds[stage.name] = measured[architecture]
            if stage.name not in done:
                costs[stage.name] = Cost(0.0, len(stage.products) * speeds[stage.name].parameters * ENCODER_BYTES / 1e9)
            continue
        place = next(number for number, word in enumerate(words) if word.endswith("train.py"))
        path, options = Path(words[place + 1]), dict(zip(words[place + 3 :: 2], words[place + 4 :: 2], strict=True))
        if stage.kind in ("pretraining", "masking"):
            if stage.name in needed:
                speeds[stage.name] = measure(warm_up, path, options)
            if stage.name not in done:
                decoded = _decoded_gigabytes(path, options, hours)
                costs[stage.name] = _pretraining(path, options, speeds[stage.name], stage.devices, decoded)
            continue
        cache = options.get("--cache_folder")
        if stage.name in done:
            caches.add(cache)
            continue
        data = options["--data_folder"]
        if data not in made and not Path(data).is_dir():
            continue
        folders = [] if data in made else _folders(path, options)
        hours |= {folder: corpus_hours(folder) for folder in folders if folder not in hours}
        heard = made[data] if data in made else sum(hours[folder] for folder in folders)
        speed = next((speeds[name] for name in stage.needs if name in speeds), FILTERBANK_SPEED)
        head = measure(warm_up_head, path, options, speed.states, speed.frames)
        # of another seed the hidden states are there already
        costs[stage.name] = _probe(path, options, speed, head, heard, cache is not None and cache in caches)
        caches.add(cache)
    return costs


@functools.cache
def _plain(text: str) -> Any:
    """Read an option as a recipe does: 1e-05 is a number, which it is not to every reader of YAML."""
    return load_hyperpyyaml(f"value: {text}")["value"]


def _value(path: Path, options: dict[str, str], key: str) -> Any:
    """A plain value of a YAML, or what the command gives instead."""
    if f"--{key}" in options:
        return _plain(options[f"--{key}"])
    return yaml_value(path, key)


def _folders(path: Path, options: dict[str, str]) -> tuple[Path, ...]:
    """Where the audio of a task lies: in its splits, if the recipe names some."""
    folder = Path(options["--data_folder"])
    if turns := sorted(folder.glob("Session*/sentences/wav")):  # IEMOCAP has the dialogues as a whole, too
        return tuple(turns)
    if not _value(path, options, "synthetic"):
        if real := [one for one in (folder / "audio" / "slurp_real", folder / "slurp_real") if one.is_dir()]:
            return (real[0],)
    splits = [_value(path, options, f"{name}_splits") or [] for name in ("train", "valid", "test")]
    return tuple(folder / split for split in sorted(set(sum(splits, [])))) or (folder,)


def _decoded_gigabytes(path: Path, options: dict[str, str], hours: dict[Path, float]) -> float:
    """Of a pre-training's audio that is decoded once, as 16-bit samples."""
    if _value(path, options, "cache") != "memory" or not Path(options["--data_folder"]).is_dir():
        return 0.0
    folders = [*_folders(path, options), *map(Path, _value(path, options, "extra_folders") or [])]
    hours |= {folder: corpus_hours(folder) for folder in folders if folder not in hours}
    return 2 * 3600 * _value(path, options, "sample_rate") * sum(hours[folder] for folder in folders) / 1e9


def _pretraining(path: Path, options: dict[str, str], speed: Speed, devices: int, decoded: float) -> Cost:
    micro_batches = devices * _value(path, options, "grad_accumulation_factor")
    update_seconds = micro_batches * _value(path, options, "max_batch_seconds")
    updates = _value(path, options, "optimizer_step_limit")
    encoders = len(_value(path, options, "encoder_at_steps")) + 1
    size = speed.parameters * (CHECKPOINTS * CHECKPOINT_BYTES + encoders * ENCODER_BYTES)
    return Cost(updates * update_seconds / speed.training / 3600, size / 1e9 + decoded)


def _probe(path: Path, options: dict[str, str], speed: Speed, head: float, hours: float, is_cached: bool) -> Cost:
    folds = FOLDS.get(_value(path, options, "folds"), 1)
    epochs = folds * _value(path, options, "number_of_epochs")
    caches = bool(_value(path, options, "cache_features"))
    trained = _value(path, options, "encoder_rest") is not None
    labelled = epochs * _label_hours(path, options, hours)
    encoded = 0.0 if is_cached else hours if caches else labelled
    own = encoded / (speed.fine_tuning if trained else speed.encoding)
    size = hours * 3600 * speed.state_bytes if caches and not is_cached and speed is not FILTERBANK_SPEED else 0.0
    return Cost(own + labelled / head, size / 1e9)


def _label_hours(path: Path, options: dict[str, str], hours: float) -> float:
    """Hours that an epoch of a head hears; what is validated counts as what is trained.

    Where few labels are a number of speakers or examples nobody knows yet how long these are: all hours, then.
    """
    limit = _value(path, options, "label_hours")
    return hours if limit is None else min(hours, limit)


def warm_up(path: Path, options: dict[str, str]) -> Speed:
    """Take a few steps of a pre-training on noise, on a GPU if one is seen.

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
    given = {key.removeprefix("--"): _plain(value) for key, value in options.items()}
    with (
        open(path, encoding="utf-8") as file,
        tempfile.TemporaryDirectory() as folder,
    ):  # the YAML's objects make folders
        hparams = load_hyperpyyaml(file, {**given, "data_folder": folder, "output_folder": folder})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: PretrainingModel = hparams["model"].to(device)
    rate, seconds = hparams["sample_rate"], float(hparams["max_batch_seconds"])
    if device.type == "cpu":  # where a part of a batch is as fast as the whole
        seconds = min(WARM_UP_SECONDS, seconds)
    if not model.measured:
        noise = _noise(min(WARM_UP_SECONDS, seconds), rate, device)
        model.measure([(noise, None)] * math.ceil(STATISTICS_SECONDS * rate / noise.numel()))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(hparams["precision"])

    def training_speed(seconds: float) -> float:
        wavs = _noise(seconds, rate, device)

        def train() -> None:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = model(wavs, None).loss
            loss.backward()
            model.zero_grad()

        return wavs.numel() / rate / _median_seconds(train, device)

    model.train()
    training = _of_what_fits(training_speed, seconds)
    speed = _encoder_speed(model.speech_encoder, _noise(min(WARM_UP_SECONDS, seconds), rate, device))
    return replace(speed, training=training, parameters=sum(one.numel() for one in model.parameters()))


def warm_up_encoder(folder: Path) -> Speed:
    """Take a few steps with an encoder on noise, on a GPU if one is seen.

    Arguments
    ---------
    folder : Path
        The encoder's.

    Returns
    -------
    Speed
        Of a pre-training it says nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speech_encoder = load_encoder(folder).to(device)
    return _encoder_speed(speech_encoder, _noise(WARM_UP_SECONDS, speech_encoder.frontend.sample_rate, device))


def _encoder_speed(speech_encoder: SpeechEncoder, wavs: torch.Tensor) -> Speed:
    """In float32, as the recipes of the tasks use it."""
    heard = wavs.numel() / speech_encoder.frontend.sample_rate

    def fine_tune() -> None:
        speech_encoder(wavs)[0].square().mean().backward()
        speech_encoder.zero_grad()

    states = []

    @torch.no_grad()
    def encode() -> None:
        states[:] = [speech_encoder(wavs)[0]]

    speech_encoder.train()
    fine_tuning = heard / _median_seconds(fine_tune, wavs.device)
    speech_encoder.eval()
    encoding = heard / _median_seconds(encode, wavs.device)
    parameters = sum(one.numel() for one in speech_encoder.parameters())
    number, rows, frames, channels = states[0].shape
    return Speed(math.inf, encoding, fine_tuning, parameters, (number, channels), rows * frames / heard)


def _of_what_fits(speed: Callable[[float], float], seconds: float) -> float:
    """Of so many seconds of audio at once, or half as many, and again, where the memory ends."""
    while True:
        try:
            return speed(seconds)
        except torch.OutOfMemoryError:
            seconds /= 2
            if seconds < WARM_UP_SECONDS:
                raise


def _noise(seconds: float, rate: int, device: torch.device) -> torch.Tensor:
    """Utterances of some ten seconds that are so long together."""
    rows = max(round(seconds / 10), 1)
    generator = torch.Generator().manual_seed(0)
    return (0.1 * torch.randn(rows, round(seconds / rows * rate), generator=generator)).to(device)


def warm_up_head(path: Path, options: dict[str, str], states: tuple[int, int], frames: float) -> float:
    """Take a few steps of a probe's head on noise in the place of hidden states, on a GPU if one is seen.

    Arguments
    ---------
    path : Path
        The recipe's YAML.
    options : dict
        What the command gives, "--key" to text.
    states : tuple of int
        Number of hidden states, and their channels.
    frames : float
        Of them in a second.

    Returns
    -------
    float
        Audio-seconds a second.
    """
    given = {key.removeprefix("--"): _plain(value) for key, value in options.items()}
    stand_in = f"speech_encoder: !new:types.SimpleNamespace\n    num_states: {states[0]}\n    output_dim: {states[1]}\n"
    text = re.sub(r"^speech_encoder: .*\n(?:    .*\n)*", stand_in, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():  # the YAML sets seeds and makes folders
        given |= {"data_folder": folder, "output_folder": folder}
        hparams = load_hyperpyyaml(text, {key: value for key, value in given.items() if key != "cache_folder"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = float(hparams["max_batch_seconds"])
    rows = max(min(hparams["max_batch_size"] or math.inf, seconds // UTTERANCE_SECONDS), 1)
    length = round(UTTERANCE_SECONDS * frames)
    hidden = torch.randn(states[0], int(rows), length, states[1], device=device)
    lengths = torch.full((int(rows),), length, device=device)
    modules = torch.nn.ModuleList()
    if "mix" in hparams:
        modules.append(hparams["mix"])
    if "embedder" in hparams:
        modules += [hparams["embedder"], hparams["classifier"](num_labels=LABELS)]
    else:
        modules.append(hparams["head"](num_labels=LABELS))
    modules.to(device).train()
    optimizer = hparams["head_optimizer"](list(modules.parameters()))

    def train() -> None:
        features, *heads = hidden[-1], *modules
        if "mix" in hparams:
            features = heads.pop(0)(hidden, lengths)
        made = heads.pop(0)(features, lengths)
        loss = heads[0](made, torch.zeros_like(lengths))[0] if heads else made.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return rows * UTTERANCE_SECONDS / _median_seconds(train, device)


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


def expected_seconds(stages: Sequence[Stage], costs: Mapping[str, Cost]) -> dict[str, float]:
    """How long stages will take, from their costs: their programs have to start, too.

    Arguments
    ---------
    stages : sequence of Stage
    costs : mapping
        As :func:`estimate` gives them.

    Returns
    -------
    dict
        By stage.
    """
    return {
        stage.name: START_SECONDS + 3600 * costs[stage.name].device_hours / stage.devices
        for stage in stages
        if stage.name in costs
    }


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
        lines.append(f"{cost.device_hours:>12.2f} {cost.gigabytes:>8.2f}  {stage.name}")
    hours, size = sum(one.device_hours for one in costs.values()), sum(one.gigabytes for one in costs.values())
    unknown = len(stages) - len(costs)
    more = f" and the {unknown} marked ?" if unknown else ""
    lines.append(f"{hours:>12.2f} {size:>8.2f}  in all{more}, without tests, by a warm-up on this machine")
    return "\n".join(lines)
