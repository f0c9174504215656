"""The part of gpu_session.py that asks what equal time on a GPU buys: both methods pre-trained, then probed."""

import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from gpu_checks import RECIPES, command, sizes
from gpu_findings import Findings, Settings, run_command
from gpu_measures import free_memory, precision, resident
from noise_corpora import write_corpus
from pretraining_cost import YAMLS, Timed
from safetensors.torch import load_file, save_file

from speechbrain_bestrq.accounting import JsonLines
from speechbrain_bestrq.artefact import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from speechbrain_bestrq.reproduction.cost import corpus_hours

#: Audio of an update: a run of minutes needs many more updates than the YAMLs' hours of audio in each would leave it.
UPDATE_SECONDS, MICRO_BATCH_SECONDS = 800, 200
PROBES = ("librispeech", "voxceleb", "iemocap", "slurp")
TRAIN_SPLITS = ("train-clean-100", "train-clean-360", "train-other-500")
#: Hours of training audio up to which it is decoded beforehand, 115 MB each.
CACHED_HOURS = 50.0
#: Of the time: for probing, and of each run's own for starting and validating.
PROBING, STARTING = 0.25, 20.0


def quality(settings: Settings, findings: Findings, seconds: float) -> None:
    """Pre-train both methods of each size for equal times and probe them; keep encoders in half precision."""
    started = time.monotonic()
    data = dict(settings.data)
    work = Path(settings.work)
    if settings.toy and "train" not in data:
        folder = write_corpus(work / "speech", "librispeech", 0.01, 2)
        data |= {
            "train": str(folder),
            "corpus": "librispeech",
            "slurp": str(write_corpus(work / "probed", "slurp", 0.05, 4)),
        }
    if "train" not in data:
        findings.row("quality", "left out: there is no --data_folder")
        return
    names = [name for size in settings.sizes for name in YAMLS["base" if settings.toy else size]]
    cache = "memory" if settings.toy or corpus_hours(Path(str(data["train"]))) <= CACHED_HOURS else "null"
    # prepared and, if there is little, decoded before the clocks start, and not in the first run's time
    prepared = work / "quality" / "prepared"
    log = Path(settings.output) / "logs" / "quality_preparing.log"
    words = command(
        "LibriSpeech/pretrain", names[0], settings, *pretraining_options(names[0], 1, data, prepared, settings, cache)
    )
    outcome = run_command(words, RECIPES / "LibriSpeech/pretrain", log, seconds)
    if outcome.status != 0:
        findings.row("quality, preparing", outcome.failure(), False)
        return
    each = (1 - PROBING) * (seconds - (time.monotonic() - started)) / len(names)
    if each < 2 * STARTING and not settings.toy:
        findings.row("quality", f"left out: {seconds:.0f} s are too few for {len(names)} pre-trainings")
        return
    runs = []
    for name in names:
        folder = work / "quality" / name
        shutil.copytree(prepared / "manifests", folder / "manifests")
        updates = 4 if settings.toy else planned_updates(name, each - STARTING, settings)
        words = command(
            "LibriSpeech/pretrain", name, settings, *pretraining_options(name, updates, data, folder, settings, cache)
        )
        log = Path(settings.output) / "logs" / f"quality_{name}.log"
        outcome = run_command(words, RECIPES / "LibriSpeech/pretrain", log, 1.3 * each)
        told = [line for line in JsonLines(folder / "train_log.jsonl").read() if line["event"] == "train"]
        if not told or not (folder / "encoder" / WEIGHTS_FILE).is_file():
            findings.row(f"{name}, pre-trained", outcome.failure(), False)
            continue
        findings.figures[f"quality {name}"] = {"last": told[-1], "updates_planned": updates}
        loss = math.nan if told[-1]["loss"] is None else told[-1]["loss"]  # of a window of skipped updates
        how = "" if outcome.status == 0 else f"; {outcome.failure()}"
        findings.row(
            f"{name}, pre-trained",
            f"{told[-1]['step']} of {updates} updates, {told[-1]['audio_hours']:.1f} audio-hours in "
            f"{60 * told[-1]['device_hours']:.1f} minutes, loss {loss:.3f}{how}",
            outcome.status == 0,
        )
        keep_half(folder / "encoder", Path(settings.output) / "encoders" / name)
        runs.append(folder)
    if runs:
        probe(runs, data, settings, findings, seconds - (time.monotonic() - started))


def planned_updates(name: str, seconds: float, settings: Settings) -> int:
    """Updates that a time is enough for, by a short measurement."""
    where = (settings.device, precision(settings), Path(settings.work))
    timed = Timed(name, resident(MICRO_BATCH_SECONDS // 10, 10.0, settings), *where)
    for _ in range(3):
        timed.block()
    speed = timed.speed
    del timed
    free_memory(settings)  # for the run
    return max(math.floor(0.9 * seconds * speed / UPDATE_SECONDS), 20)


def pretraining_options(
    name: str, updates: int, data: Mapping[str, object], folder: Path, settings: Settings, cache: str
) -> list[str]:
    """Options of train.py for a run of minutes."""
    given: dict[str, object] = {
        "data_folder": data["train"],
        "corpus": data["corpus"],
        "output_folder": folder,
        "precision": precision(settings),
        "optimizer_step_limit": updates,
        "warmup_updates": max(updates // 12, 1),
        "max_batch_seconds": 20 if settings.toy else MICRO_BATCH_SECONDS,
        "max_seconds": 20 if settings.toy else 60,
        "grad_accumulation_factor": 1 if settings.toy else UPDATE_SECONDS // MICRO_BATCH_SECONDS,
        "statistics_hours": 0.01 if settings.toy else 0.5,
        "cache": cache,
        "cache_folder": folder.parent / "cache",
        "num_workers": 0 if settings.toy else min(os.cpu_count() or 1, 8),
        "log_interval": max(updates // 50, 1),
        "valid_interval": max(updates // 3, 1),
        **sizes(name, settings),
    }
    if name.startswith("wav2vec2"):  # from 2 to 0.5 within the run, as its YAML has it for as many updates as it has
        given["quantizer"] = f"{{temperature_decay: {0.25 ** (1 / updates):.8f}}}"
    if data["corpus"] == "librispeech":
        splits = [split for split in TRAIN_SPLITS if (Path(str(data["train"])) / split).is_dir()]
        given["train_splits"] = f"[{', '.join(splits)}]"
    if data.get("extra"):
        given["extra_folders"] = f"[{', '.join(data['extra'])}]"
    return [f"--{key}={value}" for key, value in given.items()]


def probe(runs: list[Path], data: Mapping[str, object], settings: Settings, findings: Findings, seconds: float) -> None:
    """Linear probes of the runs' encoders, of untrained ones and of filter banks: sb-bestrq report --evidence."""
    corpora = [f"--{name}={data[name]}" for name in PROBES if name in data]
    if not corpora:
        findings.row("probes", f"left out: none of {', '.join(f'--{name}' for name in PROBES)} is given")
        return
    folder = Path(settings.output) / "evidence"
    program = "import sys; from speechbrain_bestrq.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "report", "--evidence", *map(str, runs), *corpora, "--untrained=1"]
    words += ["--hours=0.05" if settings.toy else "--hours=0.25", f"--output_folder={folder}"]
    outcome = run_command(words, folder.parent, Path(settings.output) / "logs" / "probes.log", seconds)
    if outcome.status != 0:
        findings.row("probes", outcome.failure(), False)
        return
    findings.section("What equal time buys", (folder / "evidence.md").read_text(encoding="utf-8"))
    findings.row("probes", f"{folder / 'evidence.md'}, {outcome.seconds:.0f} s", True)


def keep_half(encoder: Path, folder: Path) -> None:
    """Copy an encoder folder, its weights in half the bits."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, CARD_FILE):
        (folder / name).write_bytes((encoder / name).read_bytes())
    weights = load_file(encoder / WEIGHTS_FILE)
    halved = {name: one.half() if one.is_floating_point() else one for name, one in weights.items()}
    save_file(halved, folder / WEIGHTS_FILE)
