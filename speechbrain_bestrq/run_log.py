"""What a run folder tells about its run: ``run.json`` and the lines of ``train_log.jsonl``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from speechbrain_bestrq.errors import InputError

RUN_FILE = "run.json"
LOG_FILE = "train_log.jsonl"
_EVENTS = ("train", "valid")

VALIDATION_FIELDS = (
    "audio_hours",
    "device_hours",
    "loss",
    "unigram_entropy",
    "gain",
    "information",
    "accuracy",
    "commonest_share",
    "codes_used",
    "code_perplexity",
)
"""What a validation line may hold of a model's quality, beside its step: numbers or null."""
TRAINING_FIELDS = (
    *VALIDATION_FIELDS,
    "contrastive_loss",
    "diversity_loss",
    "feature_penalty",
    "probability_perplexity",
    "temperature",
    "learning_rate",
    "gradient_norm",
    "skipped_updates",
    "rewinds",
    "audio_seconds_per_second",
    "data_wait_share",
    "saving_seconds",
    "utilisation",
    "peak_memory_gb",
)
"""What any line may hold, beside its step: numbers or null."""
RUN_NUMBERS = (
    "parameters",
    "train_hours",
    "train_utterances",
    "valid_hours",
    "world_size",
    "seed",
    "updates_planned",
)
"""The numbers of ``run.json``."""
RUN_TEXTS = ("model", "chosen_by", "corpus", "device", "precision", "command")
"""The texts of ``run.json``."""


def validation_error(values: Mapping[str, Any], chosen_by: str) -> float:
    """Say how bad a validation is: the best has the least.

    Arguments
    ---------
    values : mapping
        Averages of the validation set.
    chosen_by : str
        ``chosen_by`` of :class:`speechbrain_bestrq.pretraining_model.PretrainingModel`.

    Returns
    -------
    float
        The loss, or the other one negated; infinity where either is no finite number.

    Example
    -------
    >>> validation_error({"loss": 3.5, "information": 0.25}, "information")
    -0.25
    """
    if not (math.isfinite(values["loss"]) and math.isfinite(values[chosen_by])):
        return math.inf
    return values["loss"] if chosen_by == "loss" else -values[chosen_by]


@dataclass(frozen=True)
class RunLog:
    """What a run folder tells about its run."""

    folder: Path
    """The run folder."""
    run: dict[str, Any]
    """``run.json``: model, parameters, corpus, hours, device, command, versions..."""
    train: list[dict[str, Any]]
    """The training lines of the log, by rising step, each step once."""
    valid: list[dict[str, Any]]
    """The validation lines of the log, by rising step, each step once."""


class CurvePoint(NamedTuple):
    """One validation of a run; what was not logged is None."""

    step: int
    """Updates done."""
    audio_hours: float | None
    """Hours of audio trained on until then, repeats counted."""
    device_hours: float | None
    """Hours the devices were occupied until then, summed over them."""
    loss: float | None
    """Mean cross-entropy of the masked frames, nats."""
    gain: float | None
    """Unigram cross-entropy of the validation labels minus the loss, nats."""
    accuracy: float | None
    """Share of masked frames whose label was predicted, in [0, 1]."""
    commonest_share: float | None
    """Share of the commonest label, in [0, 1]: the accuracy of always guessing it."""


def read_run(run_folder: str | Path) -> RunLog:
    """Read ``run.json`` and ``train_log.jsonl`` of a run folder.

    A resumed run logs again the steps after its checkpoint: the later lines
    count. A last line that a running or killed trainer has not finished is left out.

    Arguments
    ---------
    run_folder : str or Path
        Output folder of a pre-training run.

    Returns
    -------
    RunLog

    Raises
    ------
    InputError
        If the folder or one of the files is missing, empty or not what it should be.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "run.json").write_text('{"model": "BestRQ"}')
    >>> _ = (folder / "train_log.jsonl").write_text('{"event": "train", "step": 5, "loss": 6.5}')
    >>> read_run(folder).train
    [{'event': 'train', 'step': 5, 'loss': 6.5}]
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise InputError(f"run folder '{folder}' does not exist: give the output folder of a pre-training run.")
    run_path, log_path = folder / RUN_FILE, folder / LOG_FILE
    try:
        run = json.loads(_read_text(run_path))
    except ValueError as error:
        raise InputError(f"'{run_path}' is not JSON ({error}): restore it, or start the run again.") from error
    _check_run(run, run_path)
    kept: dict[str, list[dict[str, Any]]] = {event: [] for event in _EVENTS}
    lines = _read_text(log_path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline behind it: still being written, or cut by a kill
                break
            raise InputError(f"'{log_path}' line {number} is not JSON ({error}): delete that line.") from error
        _check_row(row, log_path, number)
        if row.get("event") in _EVENTS:
            _append(kept, row)
    if not any(kept.values()):
        raise InputError(f"'{log_path}' holds no line of a training step yet: wait for the run's first log line.")
    return RunLog(folder, run, kept["train"], kept["valid"])


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"'{path}' is missing: '{path.parent}' is not the output folder of a pre-training run, or it has not begun."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read ({error}): restore it, or start the run again.") from error
    if not text.strip():
        raise InputError(f"'{path}' is empty: restore it, or wait for the run to begin.")
    return text


def _check_run(run: Any, path: Path) -> None:
    if not isinstance(run, dict):
        raise InputError(f"'{path}' must hold one JSON object: restore it, or start the run again.")
    kinds: dict[str, tuple[Any, str]] = {key: (int | float | None, "a number") for key in RUN_NUMBERS}
    kinds |= {key: (str | None, "a text") for key in RUN_TEXTS}
    kinds["versions"] = (dict | None, "an object")
    for key, (kind, name) in kinds.items():
        if not isinstance(run.get(key), kind):
            raise InputError(f"'{path}': '{key}' is not {name}: restore it, or start the run again.")


def _check_row(row: Any, path: Path, number: int) -> None:
    if not isinstance(row, dict):
        raise InputError(f"'{path}' line {number} is not a JSON object: delete that line.")
    if row.get("event") not in _EVENTS:
        return
    if not isinstance(row.get("step"), int):
        raise InputError(f"'{path}' line {number} has no whole number 'step': delete that line.")
    for key in TRAINING_FIELDS:
        if not isinstance(row.get(key), int | float | None):
            raise InputError(f"'{path}' line {number}: '{key}' is not a number: delete that line.")


def _append(kept: dict[str, list[dict[str, Any]]], row: dict[str, Any]) -> None:
    rows = kept[row["event"]]
    if rows and row["step"] <= rows[-1]["step"]:
        # the run was resumed before that step: what the stopped run logged from there on is void. A validation line
        # alone says nothing of the training lines, which may be written a little later than it.
        void = _EVENTS if row["event"] == "train" else ("valid",)
        for event in void:
            kept[event] = [old for old in kept[event] if old["step"] < row["step"]]
    kept[row["event"]].append(row)


def number(row: dict[str, Any], key: str) -> float | None:
    """Give a field of a line, or None where it is missing, null or not finite."""
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def last_number(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Give a field of the last line that has a finite one, or None."""
    return next((row[key] for row in reversed(rows) if number(row, key) is not None), None)


def curve(run_folder: str | Path) -> list[CurvePoint]:
    """List a run's validations.

    Arguments
    ---------
    run_folder : str or Path
        Output folder of a pre-training run.

    Returns
    -------
    list of CurvePoint
        By rising step; empty if nothing was validated yet.

    Raises
    ------
    InputError
        As :func:`read_run`.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "run.json").write_text('{"model": "BestRQ"}')
    >>> line = '{"event": "valid", "step": 500, "audio_hours": 13.9, "loss": 6.3, "gain": 1.8}'
    >>> _ = (folder / "train_log.jsonl").write_text(line)
    >>> [(point.audio_hours, point.gain, point.accuracy) for point in curve(folder)]
    [(13.9, 1.8, None)]
    """
    return [
        CurvePoint(row["step"], *(number(row, key) for key in CurvePoint._fields[1:]))
        for row in read_run(run_folder).valid
    ]
