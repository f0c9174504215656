"""What a pre-training checks before it goes on: that the checkpoint is its own."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.distributed import if_main_process
from torch import nn

from speechbrain_bestrq.batching import LadderBatchSampler
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.ranks import flat
from speechbrain_bestrq.safe_reading import read_json

logger = logging.getLogger(__name__)


def check_resumable(checkpointer: Any, model: nn.Module, sampler: LadderBatchSampler) -> None:
    """Refuse to go on from a checkpoint of another model or of other batches, before anything is written.

    Arguments
    ---------
    checkpointer : Checkpointer or None
        Of the run.
    model : nn.Module
        The pre-training model.
    sampler : LadderBatchSampler
        Of the training batches; it is set to the place of the newest checkpoint.

    Raises
    ------
    InputError
        As :func:`check_signature` and the sampler's ``load_state_dict``, about the
        newest checkpoint.
    """
    checkpoint = None if checkpointer is None else checkpointer.find_checkpoint()
    if checkpoint is not None:
        check_signature(model.signature(), checkpoint.meta.get("signature", "{}"), checkpoint.path)
        try:
            load_state(sampler, checkpoint.paramfiles["sampler"], checkpoint.meta["end-of-epoch"])
        except InputError as error:
            raise InputError(f"{checkpoint.path}: {error}") from error


def check_signature(ours: dict[str, Any], saved: str, folder: Path) -> None:
    """Refuse a checkpoint of another model.

    Arguments
    ---------
    ours : dict
        The model's ``signature()``.
    saved : str
        The checkpoint's, as JSON.
    folder : Path
        The checkpoint.

    Raises
    ------
    InputError
        Naming the settings that differ.

    Example
    -------
    >>> check_signature({"encoder": {"d_model": 8}}, '{"encoder": {"d_model": 16}}', Path("save/CKPT"))
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: save/CKPT is of another model (encoder.d_model: 16 there, 8 here): \
give another output_folder, or the settings it was trained with.
    """
    here, there = flat(ours), flat(json.loads(saved))
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if names:
        differences = ", ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names)
        raise InputError(
            f"{folder} is of another model ({differences}): give another output_folder, "
            "or the settings it was trained with."
        )


#: What a parameter group holds beside the settings meant here: how it is computed, and what a schedule sets.
_OTHER_KEYS = {"params", "lr", "initial_lr", "foreach", "fused", "capturable"}


def check_optimizer(optimizer: torch.optim.Optimizer, checkpointer: Any) -> None:
    """Refuse to go on with other settings of the optimizer: loading its state would undo them without a word.

    Arguments
    ---------
    optimizer : Optimizer
        As the YAML makes it, before its state is loaded.
    checkpointer : Checkpointer or None
        Of the run, with the optimizer's state as "optimizer".

    Raises
    ------
    InputError
        Naming the settings of the newest checkpoint that differ. The learning rate is the schedule's.
    """
    checkpoint = None if checkpointer is None else checkpointer.find_checkpoint()
    if checkpoint is None:
        return
    # mapped, so that only the settings are read
    state = torch.load(checkpoint.paramfiles["optimizer"], map_location="cpu", weights_only=True, mmap=True)
    saved, ours = state["param_groups"], optimizer.param_groups
    differences = {}
    if len(saved) == len(ours):
        for there, here in zip(saved, ours, strict=True):
            for name in sorted((there.keys() | here.keys()) - _OTHER_KEYS):
                if _plain(there.get(name)) != _plain(here.get(name)):
                    differences.setdefault(name, (there.get(name), here.get(name)))
    else:
        name = "groups of parameters, of which remove_vector_weight_decay makes two"
        differences[name] = (len(saved), len(ours))
    if differences:
        told = ", ".join(f"{name}: {there} there, {here} here" for name, (there, here) in differences.items())
        raise InputError(
            f"{checkpoint.path} was trained with other settings of the optimizer ({told}): give another output_folder, "
            "or the settings it was trained with."
        )


def warn_of_changes(path: Path, facts: dict[str, Any]) -> None:
    """Warn where a run that goes on was trained otherwise before: to another end, in another precision or larger steps.

    Arguments
    ---------
    path : Path
        What the run told of itself when it was started last; where it is not readable, nothing is said.
    facts : dict
        What it tells now, with "precision", "updates_planned" and "update_seconds_at_most".
    """
    try:
        before = read_json(path)
    except (InputError, OSError):
        return
    if not isinstance(before, dict):
        return
    planned, now = before.get("updates_planned", facts["updates_planned"]), facts["updates_planned"]
    if planned != now:
        logger.warning(
            "%s was to end at update %s and now is to at %s: the rates of a schedule that rests on that change.",
            path.parent,
            planned or "without number",
            now or "one without number",
        )
    size, now = before.get("update_seconds_at_most"), facts.get("update_seconds_at_most")
    if None not in (size, now) and size != now:
        logger.warning(
            "%s was trained with updates of up to %g s of audio before and goes on with %g, at the same rates: give "
            "another --grad_accumulation_factor to stay with the first.",
            path.parent,
            size,
            now,
        )
    precision = before.get("precision", facts["precision"])
    if precision != facts["precision"]:
        logger.warning(
            "%s was trained in %s before and goes on in %s: give --precision %s to stay with it.",
            path.parent,
            precision,
            facts["precision"],
            precision,
        )


def _plain(value: Any) -> Any:
    """A setting in a form that compares: the same pair may come as a list."""
    return list(value) if isinstance(value, tuple) else value


def save_state(recoverable: Any, path: Path) -> None:
    """Save a small state of plain types: a hook for a checkpointer."""
    if if_main_process():
        Path(path).write_text(json.dumps(recoverable.state_dict()), encoding="utf-8")


def load_state(recoverable: Any, path: Path, end_of_epoch: bool) -> None:
    """Load what :func:`save_state` saved."""
    recoverable.load_state_dict(json.loads(Path(path).read_text(encoding="utf-8")))
