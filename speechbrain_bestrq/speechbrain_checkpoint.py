"""Encoders out of the checkpoints of SpeechBrain's BEST-RQ recipe; nothing in them is run."""

import ast
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from speechbrain_bestrq.convert import speech_encoder_from_speechbrain
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.speechbrain_frontend import MINIMUM_DEVIATION, SpeechBrainFbank, SpeechBrainSubsampling

HPARAMS_FILE = "hyperparams.yaml"
#: What the recipes call the model (pre-training, fine-tuning) and its ``InputNormalization``.
_MODEL_FILES = ("model.ckpt", "pt_model.ckpt")
_NORMALIZER_FILES = ("normalizer.ckpt", "normalize.ckpt")
#: A weight that every such model has.
_FIRST_WEIGHT = "0.convblock_0.convs.conv_0.conv.weight"

_ATTENTIONS = {"RelPosMHAXL": "relative", "RoPEMHA": "rotary"}
_ACTIVATIONS = {"torch.nn.GELU": "gelu", "torch.nn.SiLU": "swish", "speechbrain.nnet.activations.Swish": "swish"}
_NORMALIZATIONS = {"sentence": "utterance", "global": "global"}
#: Arguments that have no counterpart here: SpeechBrain's default, and the value that can be converted.
_FIXED = {
    "Fbank": {
        "deltas": (False, False),
        "context": (False, False),
        "requires_grad": (False, False),
        "f_min": (0, 0),
        "f_max": (None, None),
        "filter_shape": ("triangular", "triangular"),
        "param_rand_factor": (0.0, 0.0),
    },
    "InputNormalization": {
        "mean_norm": (True, True),
        "std_norm": (True, True),
        "epsilon": (MINIMUM_DEVIATION, MINIMUM_DEVIATION),
    },
    "ConvolutionFrontEnd": {
        "num_blocks": (3, 2),
        "num_layers_per_block": (5, 1),
        "strides": ([1, 2, 2], [2, 2]),
        "dilations": ([1, 1], [1, 1]),
        "padding": ("same", "same"),
        "activation": ("torch.nn.LeakyReLU", "torch.nn.LeakyReLU"),
    },
    "TransformerASR": {
        "encoder_module": ("transformer", "conformer"),
        "normalize_before": (False, True),
        "causal": (True, False),  # SpeechBrain's value where the YAML has none
    },
}


class _Tagged(NamedTuple):
    """What a YAML file has under a tag, as it stands there."""

    tag: str
    value: Any


class _DataLoader(yaml.SafeLoader):
    """Reads HyperPyYAML as data: a tag is kept and builds nothing."""


def _construct_tagged(loader: _DataLoader, tag: str, node: yaml.Node) -> _Tagged:
    if isinstance(node, yaml.MappingNode):
        return _Tagged(tag, loader.construct_mapping(node, deep=True))
    if isinstance(node, yaml.SequenceNode):
        return _Tagged(tag, loader.construct_sequence(node, deep=True))
    return _Tagged(tag, node.value)


_DataLoader.add_multi_constructor("", _construct_tagged)


class Hyperparameters:
    """A run's ``hyperparams.yaml``, read as data.

    Arguments
    ---------
    path : str or Path
        The file, or the recipe's YAML that it was made from: ``!ref <name>`` is followed.

    Raises
    ------
    InputError
        If it is not a YAML mapping.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "hyperparams.yaml"
    >>> _ = path.write_text("normalize: !new:speechbrain.processing.features.InputNormalization {norm_type: sentence}")
    >>> Hyperparameters(path).arguments("InputNormalization")
    {'norm_type': 'sentence'}
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.values = yaml.load(self.path.read_text(encoding="utf-8"), Loader=_DataLoader)
        except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.path} cannot be read as YAML ({reason}).") from error
        if not isinstance(self.values, dict):
            raise InputError(f"{self.path} is no YAML mapping: give the {HPARAMS_FILE} of the run.")

    def arguments(self, name: str) -> dict[str, Any]:
        """The arguments of the one object of a class ``name`` that the file builds."""
        found = self._find(f".{name}")
        if len(found) != 1:
            count = len(found) or "no"
            raise InputError(f"{self.path} builds {count} {name}: give the {HPARAMS_FILE} of a BEST-RQ run.")
        given = {key: self._plain(value) for key, value in found[0].items()}
        for key, (default, convertible) in _FIXED[name].items():
            value = given.get(key, default)
            if value != convertible:
                raise InputError(f"{self.path}: {name} has {key} {value}; only {convertible} can be converted.")
        return given

    def _find(self, ending: str) -> list[dict[str, Any]]:
        """The arguments of every object whose class ends so; each once, however many aliases it has."""
        found, waiting, seen = [], [self.values], set()
        while waiting:
            node = waiting.pop()
            if not isinstance(node, (dict, list, _Tagged)) or id(node) in seen:
                continue
            seen.add(id(node))
            if isinstance(node, _Tagged):
                if node.tag.startswith("!new:") and node.tag.endswith(ending):
                    found.append(node.value if isinstance(node.value, dict) else {})
                waiting.append(node.value)
            else:
                waiting.extend(node.values() if isinstance(node, dict) else node)
        return found

    def _plain(self, value: Any) -> Any:
        """A value without tags: references followed, "(2, 2)" a list, "!name:torch.nn.GELU" its name."""
        for _ in range(len(self.values)):  # a chain that is longer runs in a circle
            name = re.fullmatch(r"\s*<([^<>\[\]]+)>\s*", value.value) if self._is_reference(value) else None
            if name is None or name[1] not in self.values:
                break
            value = self.values[name[1]]
        if isinstance(value, _Tagged) and value.tag.startswith("!name:") and not value.value:
            return value.tag.removeprefix("!name:")
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return value
        return list(value) if isinstance(value, tuple) else value

    @staticmethod
    def _is_reference(value: Any) -> bool:
        return isinstance(value, _Tagged) and value.tag == "!ref" and isinstance(value.value, str)


def find_checkpoint(folder: str | os.PathLike) -> Path:
    """Find the checkpoint that a path means.

    Arguments
    ---------
    folder : str or Path
        A ``CKPT+...`` folder, or a folder that has some, itself or in ``save/``: then
        the newest.

    Returns
    -------
    Path
        A folder with the model's file.

    Raises
    ------
    InputError
        If there is none.

    Example
    -------
    >>> find_checkpoint("/nowhere")
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: /nowhere does not exist: give a CKPT+... folder of a SpeechBrain run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        missing = "is no folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {missing}: give a CKPT+... folder of a SpeechBrain run.")
    if any((folder / name).is_file() for name in _MODEL_FILES):
        return folder
    # the names are dates: their order is that of time
    for checkpoint in sorted([*folder.glob("CKPT+*"), *folder.glob("save/CKPT+*")], key=lambda path: path.name)[::-1]:
        if any((checkpoint / name).is_file() for name in _MODEL_FILES):
            return checkpoint
    raise InputError(f"{folder} has no model.ckpt, and no CKPT+... folder with one: give one of a SpeechBrain run.")


def find_hyperparameters(checkpoint: Path) -> Path:
    """Find the ``hyperparams.yaml`` of a checkpoint: in its folder, or in the run's, two above.

    Arguments
    ---------
    checkpoint : Path
        The ``CKPT+...`` folder.

    Returns
    -------
    Path

    Raises
    ------
    InputError
        If there is none.

    Example
    -------
    >>> find_hyperparameters(Path("/run/save/CKPT+2024"))
    Traceback (most recent call last):
    speechbrain_bestrq.errors.InputError: no hyperparams.yaml in /run/save/CKPT+2024 or /run: give it by --hparams.
    """
    folders = (checkpoint, checkpoint.absolute().parent.parent)
    for folder in folders:
        if (folder / HPARAMS_FILE).is_file():
            return folder / HPARAMS_FILE
    raise InputError(f"no {HPARAMS_FILE} in {' or '.join(map(str, folders))}: give it by --hparams.")


def read_speechbrain_checkpoint(checkpoint: Path, hparams: str | os.PathLike) -> SpeechEncoder:
    """Read the encoder of a SpeechBrain BEST-RQ run.

    Sizes come from the weights, and what these do not show from the hyperparameters.
    The weights are unpickled as tensors only; the YAML file is read as data.

    Arguments
    ---------
    checkpoint : Path
        A ``CKPT+...`` folder.
    hparams : str or Path
        The run's ``hyperparams.yaml``.

    Returns
    -------
    SpeechEncoder
        In eval mode; equal to SpeechBrain's modules on unpadded waveforms.

    Raises
    ------
    InputError
        If a file is missing or is of another model, or if the model has a part that
        has no counterpart here.
    """
    hyperparameters = Hyperparameters(hparams)
    fbank, normalization, convolutions, transformer = map(hyperparameters.arguments, _FIXED)
    path, weights = _read_model(checkpoint)
    try:
        attention = _look_up(hyperparameters, "attention_type", transformer.get("attention_type"), _ATTENTIONS)
        activation = transformer.get("conformer_activation", "speechbrain.nnet.activations.Swish")
        frontend = SpeechBrainFbank(
            fbank.get("sample_rate", 16000),
            fbank.get("n_mels", 40),
            fbank.get("win_length", 25),
            fbank.get("hop_length", 10),
            fbank.get("n_fft", 400),
            _look_up(hyperparameters, "norm_type", normalization.get("norm_type", "global"), _NORMALIZATIONS),
        )
        kernel = weights[_FIRST_WEIGHT]
        d_model, num_heads = _check_sizes(hyperparameters, transformer, weights)
        subsampling = SpeechBrainSubsampling(
            frontend.num_mels,
            d_model,
            (len(kernel), len(weights["0.convblock_1.convs.conv_0.conv.weight"])),
            kernel.shape[-1],
            convolutions.get("dropout", 0.1),
        )
        encoder = ConformerEncoder(
            d_model,
            1 + max(int(name.split(".")[4]) for name in weights if name.startswith("1.transformer.encoder.layers.")),
            num_heads,
            len(weights["1.transformer.encoder.layers.0.ffn_module1.1.ffn.0.weight"]),
            weights["1.transformer.encoder.layers.0.convolution_module.conv.weight"].shape[-1],
            transformer.get("dropout", 0.1),
            transformer.get("layerdrop_prob", 0.0),
            attention,
            _look_up(hyperparameters, "conformer_activation", activation, _ACTIVATIONS),
        )
        speech_encoder = SpeechEncoder(frontend, subsampling, encoder)
        converted = speech_encoder_from_speechbrain(weights, num_heads, attention)
        if frontend.normalize == "global":
            converted.update(_read_statistics(checkpoint, frontend.num_mels))
        speech_encoder.load_state_dict(converted)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).strip("'\"").split())[:300]
        raise InputError(f"{path} does not fit {hyperparameters.path}: {reason}") from error
    if not all(tensor.isfinite().all() for tensor in converted.values()):
        raise InputError(f"{path} holds values that are not finite: take an older checkpoint.")
    return speech_encoder.eval()


def _look_up(hyperparameters: Hyperparameters, key: str, value: Any, known: dict[str, str]) -> str:
    if value not in known:
        raise InputError(f"{hyperparameters.path}: {key} {value} cannot be converted, only {', '.join(known)}.")
    return known[value]


def _check_sizes(
    hyperparameters: Hyperparameters, transformer: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[int, int]:
    """d_model and the number of heads; a wrong one of these would fit the weights and give wrong outputs."""
    given = {"d_model": transformer.get("d_model", 512), "nhead": transformer.get("nhead", 8)}
    found = {"d_model": len(weights["1.transformer.encoder.norm.norm.weight"])}
    biases = weights.get("1.transformer.encoder.layers.0.mha_layer.pos_bias_u")
    if biases is not None:
        found["nhead"] = biases.shape[1]
    for key, value in found.items():
        if given[key] != value:
            raise InputError(
                f"{hyperparameters.path}: {key} is {given[key]}, but {value} in the weights: of another run."
            )
    return given["d_model"], given["nhead"]


def _read_model(checkpoint: Path) -> tuple[Path, dict[str, Tensor]]:
    """The model's file and its weights, in float32."""
    first = None
    for path in (checkpoint / name for name in _MODEL_FILES):
        if path.is_file():
            weights = _read_tensors(path)
            if _FIRST_WEIGHT in weights:
                return path, {name: weight.float() for name, weight in weights.items()}
            first = first or (path, next(iter(weights), "none"))
    if first is None:
        raise InputError(f"{checkpoint} has no {_MODEL_FILES[0]}: give a CKPT+... folder of a SpeechBrain run.")
    raise InputError(f"{first[0]} is not of SpeechBrain's BEST-RQ recipe: it has no {_FIRST_WEIGHT}, but {first[1]}.")


def _read_statistics(checkpoint: Path, num_mels: int) -> dict[str, Tensor]:
    """The global mean and deviation that ``InputNormalization`` saved, under our names."""
    for path in (checkpoint / name for name in _NORMALIZER_FILES):
        if path.is_file():
            saved = _read_tensors(path, others=True)
            mean, deviation = saved.get("glob_mean"), saved.get("glob_std")
            if not all(isinstance(value, Tensor) and value.numel() == num_mels for value in (mean, deviation)):
                raise InputError(f"{path} has no mean and deviation of {num_mels} mel bins: they were never measured.")
            deviation = deviation.float().flatten().clamp(min=MINIMUM_DEVIATION)
            return {"frontend.mean": mean.float().flatten(), "frontend.deviation": deviation}
    raise InputError(f"{checkpoint} has no {_NORMALIZER_FILES[0]}, which the norm_type global needs: copy it there.")


def _read_tensors(path: Path, others: bool = False) -> dict[str, Any]:
    """A saved dictionary of tensors, and of plain values if ``others``; anything else in the file is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as tensors, and nothing else is loaded ({reason}).") from error
    if not isinstance(saved, dict) or not (others or all(isinstance(value, Tensor) for value in saved.values())):
        raise InputError(f"{path} is no dictionary of tensors: it was not saved by SpeechBrain's checkpointer.")
    return saved
