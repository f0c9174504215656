"""What a downstream run is trained with, and what may not change before it goes on."""

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from speechbrain.nnet.schedulers import NewBobScheduler

from speechbrain_bestrq.errors import InputError


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Those of some values that are plain JSON, as it gives them back.

    Arguments
    ---------
    values : dict
        Of a YAML.

    Returns
    -------
    dict
        Without modules, optimisers... and what begins with two underscores.

    Example
    -------
    >>> plain_values({"seed": 1, "sizes": (8, 4), "most": float("inf"), "head": object(), "__set_seed": None})
    {'seed': 1, 'sizes': [8, 4], 'most': 'inf'}
    """
    settings = {}
    for name, value in values.items():
        if name.startswith("__"):
            continue
        try:
            settings[name] = json.loads(json.dumps(value, allow_nan=False))
        except TypeError:  # a module, an optimiser...
            continue
        except ValueError:  # infinite, which JSON does not know
            settings[name] = str(value)
    return settings


#: Settings of tasks that are numbers above 0, and whole numbers of at least 1; and which of them may be null.
_ABOVE_ZERO = (
    "max_batch_seconds",
    "max_eval_batch_seconds",
    "label_hours",
    "chunk_seconds",
    "valid_share",
    "max_grad_norm",  # 0 would clip all there is
)
_COUNTS = ("number_of_epochs", "max_batch_size", "examples_per_class", "train_speakers")
_OR_NULL = {"label_hours", "chunk_seconds", "max_batch_size", "examples_per_class", "train_speakers"}


def check_numbers(hparams: Mapping[str, Any]) -> None:
    """Refuse settings that are no numbers of their kind, before any work.

    Arguments
    ---------
    hparams : mapping
        Of the YAML of a task.

    Raises
    ------
    InputError
        Naming one.

    Example
    -------
    >>> check_numbers({"label_hours": "1h"})
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: --label_hours 1h: give a number above 0, or null.
    """
    for names, kind, fits in (
        (_ABOVE_ZERO, "a number above 0", lambda value: value > 0),
        (_COUNTS, "a whole number, 1 at least", lambda value: value >= 1 and float(value).is_integer()),
        (("encoder_rest", "encoder_warmup"), "a number", lambda value: True),
    ):
        for name in names:
            value = hparams.get(name, 1)
            nullable = name in _OR_NULL
            if value is None and nullable:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                shown = "null" if value is None else value
                raise InputError(f"--{name} {shown}: give {kind}{', or null' if nullable else ''}.")


#: A setting that counts where the rates of each epoch depend on it.
EPOCHS = "number_of_epochs"


def check_progress(
    progress: dict[str, Any],
    folder: Path,
    settings: dict[str, Any],
    composed_settings: dict[str, Any],
    encoder: dict[str, str],
    source: str,
    free: Set[str],
    goes_on: bool = True,
) -> None:
    """Refuse a checkpoint of other settings, but for the free ones, or of another encoder.

    Arguments
    ---------
    progress : dict
        What the checkpoint tells: "settings", "composed_settings" and what ``encoder`` has.
    folder : Path
        The checkpoint, for the message.
    settings, composed_settings : dict
        Those of now, plain values.
    encoder : dict
        What the encoder is, as :meth:`~speechbrain_bestrq.task_encoders.TaskEncoder.identity` says it.
    source : str
        Of the encoder, for the message.
    free : set of str
        Settings that may change.
    goes_on : bool
        Whether it is to be trained further. For a test a setting that there was not or is no more does not count.

    Raises
    ------
    InputError
        Naming what differs.

    Example
    -------
    >>> progress = {"encoder": "a1", "settings": {"seed": 1, "data_folder": "old"}}
    >>> check_progress(progress, Path("save"), {"seed": 1}, {}, {"encoder": "a1"}, "encoder", {"data_folder"})
    >>> check_progress(progress, Path("save"), {"seed": 2}, {}, {"encoder": "a1"}, "encoder", {"data_folder"})
    Traceback (most recent call last):
    ...
    speechbrain_bestrq.errors.InputError: the checkpoint in save was trained with seed 1, not 2: give another \
--output_folder, or that setting.
    """
    advice = "give another --output_folder, or that"
    if any(progress.get(name, value) != value for name, value in encoder.items()):  # older ones tell the weights alone
        raise InputError(f"the checkpoint in {folder} was trained on another encoder than {source}: {advice} encoder.")
    # a switch that the run's version did not have yet was off; what its version did not keep at all is not compared
    composed = progress.get("composed_settings", composed_settings)
    # nor is what was no setting by itself then: where it goes into, as the rate of an optimiser, it is
    plain = {name: value for name, value in progress["settings"].items() if name not in free}
    settings = {name: value for name, value in settings.items() if name in plain or isinstance(value, bool)}
    for before, now, missing in ((plain, settings, False), (composed, composed_settings, None)):
        for name in sorted(before.keys() | now.keys()):
            there, here = before.get(name, missing if name in now else None), now.get(name)
            if not goes_on and not (name in before and name in now):
                continue  # weights that do not fit do not load
            if name == EPOCHS and name not in before:
                continue  # the run's version had no need to keep it
            if before is plain and name not in now:
                raise InputError(
                    f"the checkpoint in {folder} was trained with {name} {there!r}, a setting that this YAML does not "
                    "have: give another --output_folder, or go on with the version that began it."
                )
            if there != here:
                raise InputError(
                    f"the checkpoint in {folder} was trained with {name} {there!r}, not {here!r}: {advice} setting."
                )


def utterance_digest(rows: dict[str, dict[str, Any]]) -> str:
    """Digest what is known of utterances, but not where they lie.

    Arguments
    ---------
    rows : dict
        By utterance, its columns; "wav" is left out.

    Returns
    -------
    str
        Equal for equal utterances, in whatever order.

    Example
    -------
    >>> first, moved = ({"a": {"wav": wav, "wrd": "YES"}} for wav in ("old/a.flac", "new/a.flac"))
    >>> utterance_digest(first) == utterance_digest(moved) != utterance_digest({"a": {"wrd": "NO"}})
    True
    """
    hashed = hashlib.sha256()
    for number, name in enumerate(sorted(rows)):  # piece by piece: there may be millions
        told = {key: str(value) for key, value in rows[name].items() if key != "wav"}
        hashed.update(f"{', ' if number else '{'}{json.dumps(name)}: {json.dumps(told, sort_keys=True)}".encode())
    hashed.update(b"}" if rows else b"{}")
    return hashed.hexdigest()[:16]


def check_first_rate(part: str, optimizer: Any, annealing: Any) -> None:
    """Refuse a rate that would hold for one epoch, for annealing goes on from its own.

    Arguments
    ---------
    part : str
        "encoder", "mix" or "head", for the message.
    optimizer : callable or None
        Makes the optimiser, as ``!name:torch.optim.Adam`` does.
    annealing : object or None
        A schedule of SpeechBrain's, for epochs.

    Raises
    ------
    InputError
        If both tell a rate, and not the same.

    Example
    -------
    >>> from functools import partial
    >>> import torch
    >>> check_first_rate("head", partial(torch.optim.Adam, lr=0.001), NewBobScheduler(0.001))
    """
    if optimizer is None or annealing is None:
        return
    rate, first = _rate(optimizer), _first_rate(annealing)
    if rate is not None and first is not None and not math.isclose(rate, first, rel_tol=1e-4):
        raise InputError(
            f"the {part}'s learning rate is {rate:g} in {part}_optimizer and {first:g} in {part}_annealing, which "
            "would set it after an epoch: give both the same."
        )


def _rate(optimizer: Any) -> float | None:
    """What a constructor, bare or with arguments as ``!name:`` makes it, is going to give; None if it does not tell."""
    given = getattr(optimizer, "keywords", {})
    known = inspect.signature(getattr(optimizer, "func", optimizer)).parameters
    rate = given.get("lr", known["lr"].default if "lr" in known else None)
    return float(rate) if isinstance(rate, int | float) else None


def _first_rate(annealing: Any) -> float | None:
    """Of SpeechBrain's schedules that are for epochs; None of others."""
    if isinstance(annealing, NewBobScheduler):
        return annealing.hyperparam_value
    epochs = getattr(annealing, "value_at_epoch", None)
    return epochs[0] if epochs else getattr(annealing, "initial_value", None)
