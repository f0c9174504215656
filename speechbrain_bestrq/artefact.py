"""The artefact of a pre-training run: an encoder folder of JSON, safetensors and a card."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
from speechbrain_bestrq.safe_reading import check_sizes, file_inside, read_json, read_shapes
from speechbrain_bestrq.speechbrain_frontend import SpeechBrainFbank, SpeechBrainSubsampling
from speechbrain_bestrq.transformer import TransformerEncoder
from speechbrain_bestrq.transformers_names import (
    encoder_description,
    encoder_weights,
    is_transformers_config,
    normalizes_input,
)
from speechbrain_bestrq.writing import sync, sync_tree

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
FORMAT = 1
#: What an encoder folder may hold, the last put there by ``sb-bestrq export --to speechbrain``.
_FILES = {CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, "hyperparams.yaml"}
#: The classes that a "type" in each section of a description may name.
_KINDS = {
    "frontend": (LogMel, SpeechBrainFbank, ConvFeatureExtractor),
    "subsampling": (ConvSubsampling, SpeechBrainSubsampling, FeatureProjection),
    "encoder": (ConformerEncoder, TransformerEncoder),
}


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
    parts = {section: getattr(speech_encoder, section) for section in _KINDS}
    return {
        "format": FORMAT,
        **{section: {"type": type(part).__name__, **part.config} for section, part in parts.items()},
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
        found, foreign = config.get("format"), config.get("model_type")
        if foreign is not None:
            raise InputError(f"encoder config: of the transformers library's models wav2vec2 is read, not {foreign}.")
        raise InputError(f"encoder config: format {found} is not {FORMAT}: install the release that wrote it.")
    try:
        return SpeechEncoder(*(_build_part(section, dict(config[section])) for section in _KINDS))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"encoder config: not a whole description of an encoder ({error}).") from error


def _build_part(section: str, settings: dict[str, Any]) -> nn.Module:
    """Build the front end, the subsampling or the encoder from its section of a description."""
    name = settings.pop("type")
    kinds = {kind.__name__: kind for kind in _KINDS[section]}
    if name not in kinds:
        raise InputError(f"encoder config: unknown {section} type {name!r}: install the release that wrote it.")
    return kinds[name](**settings)


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

    Raises
    ------
    InputError
        If that is a file, or a folder of something else. What else lies in an encoder folder stays there.
    OSError
        If the disk does not take it: an older folder stays as it is, and nothing is left of the new one.

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
    given = Path(folder)
    folder = given.resolve()  # what a link names is replaced, and not the link
    beside = folder.with_name(f"{folder.name}.writing")
    replaced = folder.with_name(f"{folder.name}.replaced")
    check_place(folder)
    if replaced.exists():  # of one that was killed between the last steps
        _refuse_foreign(replaced)
        if folder.exists():
            _hand_over(replaced, folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)
    if beside.exists():
        _refuse_foreign(beside)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        _write_files(speech_encoder, beside, card, facts)
        sync_tree(beside)
    except Exception:
        shutil.rmtree(beside, ignore_errors=True)  # what a full disk took of it would keep the disk full
        raise
    if folder.exists():
        folder.rename(replaced)
    beside.rename(folder)
    _hand_over(replaced, folder)
    # a checkpoint that says that the encoder is written must not outlive it in a power cut
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return given


def check_place(folder: str | os.PathLike) -> None:
    """Refuse to put an encoder where something else is.

    Arguments
    ---------
    folder : str or Path
        Where it is to be.

    Raises
    ------
    InputError
        If there is a file, or a folder that holds something and is no encoder.

    Example
    -------
    >>> check_place(getfixture("tmp_path"))
    """
    folder = Path(folder)
    holds = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if folder.is_file() or (holds and not (folder / CONFIG_FILE).exists()):
        raise InputError(f"{folder} is there and is no encoder: give another name, or move it away.")


def _refuse_foreign(folder: Path) -> None:
    """Leave alone what has the name of a folder of ours on the way, and is none."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names and not names & _FILES:
        raise OSError(errno.EEXIST, "is in the way: move it away", str(folder))


def _hand_over(source: Path, target: Path) -> None:
    """Move what lies in an encoder folder and is not of it: somebody's notes, or a repository's."""
    for path in source.iterdir() if source.is_dir() else ():
        if path.name not in _FILES and not (target / path.name).exists():
            path.rename(target / path.name)


def _write_files(speech_encoder: SpeechEncoder, folder: Path, card: str, facts: dict[str, Any]) -> None:
    """Write the files of an encoder folder."""
    config = {**encoder_config(speech_encoder), "training": facts}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in speech_encoder.state_dict().items()}
    try:
        save_file(weights, folder / WEIGHTS_FILE)
    except SafetensorError as error:  # is no OSError, whatever the disk said
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(folder / WEIGHTS_FILE)) from error
    # safetensors writes files that only their owner can read
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def load_encoder(folder: str | os.PathLike, trained: bool = True) -> SpeechEncoder:
    """Load an encoder folder; nothing in it is run.

    What the folder says is checked before anything is built from it: the shapes in the
    weights' header must be those of the config's architecture.

    Arguments
    ---------
    folder : str or Path
        As :func:`save_encoder` wrote it, or the folder of a wav2vec 2.0 model of
        transformers (config.json with the ``model_type`` "wav2vec2", model.safetensors).
    trained : bool
        False gives the same architecture with fresh weights, drawn by the global
        generator; what the folder holds besides parameters (the front end's
        statistics) is loaded all the same, so that the inputs are the same.

    Returns
    -------
    SpeechEncoder
        In eval mode, on the CPU. With ``trained`` the global generator is left as it was.

    Raises
    ------
    InputError
        If a file is missing, is not what its name says, or does not fit.
    """
    folder = Path(folder)
    config_path, weights_path = (file_inside(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config, shapes = read_json(config_path), read_shapes(weights_path)
    of_transformers = is_transformers_config(config)
    if of_transformers:
        config, shapes = _translate(folder, config, shapes)
    try:
        check_sizes(config, len(shapes))
        with torch.device("meta"):  # takes no memory, whatever the sizes
            described = build_encoder(config)
            described.num_frames(described.frontend.sample_rate)
    except InputError as error:
        raise InputError(f"{config_path}: {error}") from error
    except Exception as error:  # numbers from an unknown hand: division by zero, negative shapes...
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{config_path}: encoder config: not that of an encoder ({reason}).") from error
    _check_shapes({name: tuple(tensor.shape) for name, tensor in described.state_dict().items()}, shapes, weights_path)
    try:
        weights = load_file(weights_path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights_path} cannot be read ({error}): copy the folder again.") from error
    if of_transformers:
        weights = encoder_weights(weights)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise InputError(f"{weights_path} holds values that are not finite: it was saved before training.")
    if trained:
        with torch.random.fork_rng(devices=[]):
            speech_encoder = build_encoder(config)
    else:
        speech_encoder = build_encoder(config)
        parameters = {name: parameter.detach() for name, parameter in speech_encoder.named_parameters()}
        weights = {**weights, **parameters}
    speech_encoder.load_state_dict(weights)
    return speech_encoder.eval()


def _translate(
    folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Describe the encoder of a transformers folder, and give the shapes of its weights under our names."""
    try:
        weights = encoder_weights({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        kept = "subsampling.mask_embedding" in weights
        description = encoder_description(config, normalizes_input(folder, config), kept)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: not that of a wav2vec 2.0 model ({error}).") from error
    return description, {name: tuple(weight.shape) for name, weight in weights.items()}


def _check_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], path: Path) -> None:
    """Refuse weights that are not those of the architecture; the first misfit is named."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            if name not in found:
                problem = f"{name!r:.80} is missing"
            elif name not in expected:
                problem = f"{name!r:.80} has no place in it"
            else:
                problem = f"{name!r:.80} is {found[name]} and should be {expected[name]}"
            raise InputError(f"{path} does not fit {CONFIG_FILE}: {problem}; copy the folder again.")


def encoders_at_steps(folder: str | os.PathLike) -> dict[int, Path]:
    """Find the encoders that a pre-training has left of some of its updates, ``encoder@<step>``.

    What is being written, or has been taken the place of, is passed over.

    Arguments
    ---------
    folder : str or Path
        The pre-training's output folder.

    Returns
    -------
    dict
        Folders by their update.

    Example
    -------
    >>> run = getfixture("tmp_path")
    >>> for name in ("encoder", "encoder@40", "encoder@80.writing"):
    ...     (run / name).mkdir()
    >>> [path.name for path in encoders_at_steps(run).values()]
    ['encoder@40']
    """
    steps = {path.name.removeprefix("encoder@"): path for path in Path(folder).glob("encoder@*")}
    return {int(step): path for step, path in steps.items() if step.isdecimal() and path.is_dir()}
