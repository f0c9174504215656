"""The artefact of a pre-training run: an encoder folder of JSON, safetensors and a card."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
FORMAT = 1


def encoder_config(speech_encoder: SpeechEncoder) -> dict[str, Any]:
    """Describe an encoder's architecture.

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        The encoder.

    Returns
    -------
    dict
        Plain JSON, from which :func:`build_encoder` makes the same architecture.

    Example
    -------
    >>> speech_encoder = SpeechEncoder(
    ...     LogMel(), ConvSubsampling(d_model=16), ConformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32)
    ... )
    >>> encoder_config(speech_encoder)["encoder"]["d_model"]
    16
    """
    return {
        "format": FORMAT,
        "frontend": speech_encoder.frontend.config,
        "subsampling": speech_encoder.subsampling.config,
        "encoder": {"type": type(speech_encoder.encoder).__name__, **speech_encoder.encoder.config},
    }


def build_encoder(config: dict[str, Any]) -> SpeechEncoder:
    """Build an encoder, untrained, from its description.

    Arguments
    ---------
    config : dict
        As :func:`encoder_config` gives it.

    Returns
    -------
    SpeechEncoder

    Raises
    ------
    InputError
        If the description is of another format, or not of a known encoder.

    Example
    -------
    >>> build_encoder({"format": 2})
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: encoder config: format 2 is not 1: install the release that wrote it.
    """
    if not isinstance(config, dict):
        raise InputError("encoder config: not a JSON object: copy the folder again.")
    if config.get("format") != FORMAT:
        found = config.get("format")
        raise InputError(f"encoder config: format {found} is not {FORMAT}: install the release that wrote it.")
    try:
        settings = dict(config["encoder"])
        kind = settings.pop("type")
        if kind != ConformerEncoder.__name__:
            raise InputError(f"encoder config: unknown encoder type {kind!r}: install the release that wrote it.")
        return SpeechEncoder(
            LogMel(**config["frontend"]), ConvSubsampling(**config["subsampling"]), ConformerEncoder(**settings)
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"encoder config: not a whole description of an encoder ({error}).") from error


def save_encoder(speech_encoder: SpeechEncoder, folder: str | os.PathLike, card: str, **facts: Any) -> Path:
    """Write an encoder folder; an older one of the same name is replaced only when the new one is whole.

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        What to save.
    folder : str or Path
        Where to.
    card : str
        Markdown for people: data, hours, steps, cost, curve.
    **facts
        Plain JSON to keep in config.json under "training".

    Returns
    -------
    Path
        The folder.

    Example
    -------
    >>> import tempfile, torch
    >>> speech_encoder = SpeechEncoder(
    ...     LogMel(normalize="utterance"),
    ...     ConvSubsampling(d_model=16),
    ...     ConformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32),
    ... )
    >>> folder = save_encoder(speech_encoder, Path(tempfile.mkdtemp()) / "encoder", "# A small encoder", steps=0)
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    >>> hidden, lengths = load_encoder(folder)(torch.randn(1, 16000))
    >>> hidden.shape
    torch.Size([2, 1, 25, 16])
    """
    folder = Path(folder)
    beside = folder.with_name(f"{folder.name}.writing")
    replaced = folder.with_name(f"{folder.name}.replaced")
    for leftover in (beside, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    config = {**encoder_config(speech_encoder), "training": facts}
    (beside / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (beside / CARD_FILE).write_text(card, encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in speech_encoder.state_dict().items()}
    save_file(weights, beside / WEIGHTS_FILE)
    if folder.exists():
        folder.rename(replaced)
    beside.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return folder


def load_encoder(folder: str | os.PathLike) -> SpeechEncoder:
    """Load an encoder folder; nothing in it is run.

    Arguments
    ---------
    folder : str or Path
        As :func:`save_encoder` wrote it.

    Returns
    -------
    SpeechEncoder
        In eval mode, on the CPU.

    Raises
    ------
    InputError
        If a file is missing or does not fit.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no encoder folder: it has no {name}.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's own error, and that of bytes that are no text
        raise InputError(f"{folder / CONFIG_FILE} is not JSON ({error}): copy the folder again.") from error
    speech_encoder = build_encoder(config)
    try:
        speech_encoder.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} ({reason}).") from error
    if not all(tensor.isfinite().all() for tensor in speech_encoder.state_dict().values()):
        raise InputError(f"{folder / WEIGHTS_FILE} holds values that are not finite: it was saved before training.")
    return speech_encoder.eval()
