"""wav2vec 2.0 folders of Hugging Face's transformers: their settings and the names of their weights, and ours."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.safe_reading import file_inside, read_json

PREPROCESSOR_FILE = "preprocessor_config.json"
#: In which transformers 5 keeps the same, under :data:`_FEATURE_EXTRACTOR`, and writes no other.
PROCESSOR_FILE = "processor_config.json"
_FEATURE_EXTRACTOR = "feature_extractor"

#: What transformers assumes where a config.json is silent.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "feat_quantizer_dropout": 0.0,
    "layerdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "num_codevectors_per_group": 320,
    "num_codevector_groups": 2,
    "contrastive_logits_temperature": 0.1,
    "num_negatives": 100,
    "codevector_dim": 256,
    "proj_codevector_dim": 256,
    "diversity_loss_weight": 0.1,
    "add_adapter": False,
    "adapter_attn_dim": None,
}

#: What only some models have and this project does not, with the value that means its absence.
_UNSUPPORTED = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "add_adapter": False,
    "adapter_attn_dim": None,
}

_MASK_EMBEDDING, _ENCODER = "masked_spec_embed", "speech_encoder."

#: Names in an encoder, theirs and ours, without ".weight" and ".bias"; {} is a number.
_ENCODER_NAMES = {
    "feature_extractor.conv_layers.{}.conv": "frontend.convolutions.{}",
    "feature_extractor.conv_layers.{}.layer_norm": "frontend.norms.{}",
    "feature_projection.layer_norm": "subsampling.norm",
    "feature_projection.projection": "subsampling.projection",
    "encoder.pos_conv_embed.conv": "encoder.positions.convolution",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0": (
        "encoder.positions.convolution.parametrizations.weight.original0"
    ),
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": (
        "encoder.positions.convolution.parametrizations.weight.original1"
    ),
    "encoder.layer_norm": "encoder.norm",
    "encoder.layers.{}.attention.out_proj": "encoder.layers.{}.attention.out",
    "encoder.layers.{}.layer_norm": "encoder.layers.{}.attention_norm",
    "encoder.layers.{}.feed_forward.intermediate_dense": "encoder.layers.{}.feed_forward.0",
    "encoder.layers.{}.feed_forward.output_dense": "encoder.layers.{}.feed_forward.3",
    "encoder.layers.{}.final_layer_norm": "encoder.layers.{}.feed_forward_norm",
}
#: Names of what pre-training adds.
_HEAD_NAMES = {
    "quantizer.weight_proj": "quantizer.projection",
    "quantizer.codevectors": "quantizer.codebooks",
    "project_hid": "prediction_head",
    "project_q": "target_head",
}
_QKV = "encoder.layers.{}.attention.{}_proj"
_OUR_QKV = "encoder.layers.{}.attention.qkv"
#: torch.nn.utils.weight_norm's names of what its successor calls original0 and original1.
_OLD_WEIGHT_NORM = {
    "conv.weight_g": "conv.parametrizations.weight.original0",
    "conv.weight_v": "conv.parametrizations.weight.original1",
}


def is_transformers_config(config: Any) -> bool:
    """Tell whether a config.json is that of a wav2vec 2.0 model of transformers.

    Arguments
    ---------
    config : object
        What the file holds.

    Returns
    -------
    bool

    Example
    -------
    >>> is_transformers_config({"model_type": "wav2vec2"}), is_transformers_config({"format": 1})
    (True, False)
    """
    return isinstance(config, dict) and config.get("model_type") == "wav2vec2"


def normalizes_input(folder: Path, config: dict[str, Any]) -> bool:
    """Tell whether a folder's waveforms are to be normalised.

    Arguments
    ---------
    folder : Path
        The folder; its preprocessor_config.json tells, or its processor_config.json.
    config : dict
        Its config.json: without the other files, waveforms are normalised if the convolutions have layer norm.

    Returns
    -------
    bool

    Raises
    ------
    InputError
        If the file is no JSON object, or is of another sample rate than 16 kHz.
    """
    name = next((one for one in (PREPROCESSOR_FILE, PROCESSOR_FILE) if (folder / one).exists()), None)
    if name is None:
        return config.get("feat_extract_norm") == "layer"
    path = file_inside(folder, name)
    settings = read_json(path)
    if name == PROCESSOR_FILE and isinstance(settings, dict):
        settings = settings.get(_FEATURE_EXTRACTOR)
    if not isinstance(settings, dict):
        raise InputError(f"{path} holds no JSON object: copy the folder again.")
    rate = settings.get("sampling_rate", 16000)
    if rate != 16000:
        raise InputError(f"{path}: sampling_rate is {rate!r:.40}: only models of 16000 Hz can be read.")
    return bool(settings.get("do_normalize", True))


def is_pretraining_model(names: Mapping[str, Any]) -> bool:
    """Tell from the names of a folder's weights whether it holds quantizer and heads of pre-training too."""
    return any(name.startswith("quantizer.") for name in names)


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Fill a config.json of transformers up with what it takes for granted.

    Arguments
    ---------
    config : dict
        The file's content.

    Returns
    -------
    dict
        All keys of :data:`DEFAULTS`.

    Raises
    ------
    InputError
        If the model has a part that this project has not.
    """
    settings = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    for name, supported in _UNSUPPORTED.items():
        if settings[name] != supported:
            raise InputError(
                f"config.json: {name} is {settings[name]!r:.40}: only models with {supported!r} can be read."
            )
    return settings


def encoder_description(config: dict[str, Any], normalize_input: bool, keep_mask_embedding: bool) -> dict[str, Any]:
    """Describe the encoder of a transformers folder as :func:`speechbrain_bestrq.artefact.encoder_config` does.

    Arguments
    ---------
    config : dict
        Its config.json.
    normalize_input : bool
        Whether waveforms are normalised first; its preprocessor_config.json tells.
    keep_mask_embedding : bool
        Whether the encoder carries ``masked_spec_embed`` along.

    Returns
    -------
    dict

    Raises
    ------
    InputError
        As :func:`settings_of`.
    """
    settings = settings_of(config)
    return {
        "format": 1,
        "frontend": {
            "type": "ConvFeatureExtractor",
            "channels": settings["conv_dim"],
            "kernel_sizes": settings["conv_kernel"],
            "strides": settings["conv_stride"],
            "norm": settings["feat_extract_norm"],
            "bias": settings["conv_bias"],
            "normalize_input": normalize_input,
        },
        "subsampling": {
            "type": "FeatureProjection",
            "num_features": settings["conv_dim"][-1],
            "d_model": settings["hidden_size"],
            "dropout": settings["feat_proj_dropout"],
            "eps": settings["layer_norm_eps"],
            "keep_mask_embedding": keep_mask_embedding,
        },
        "encoder": {
            "type": "TransformerEncoder",
            "d_model": settings["hidden_size"],
            "num_layers": settings["num_hidden_layers"],
            "num_heads": settings["num_attention_heads"],
            "d_ffn": settings["intermediate_size"],
            "dropout": settings["hidden_dropout"],
            "attention_dropout": settings["attention_dropout"],
            "activation_dropout": settings["activation_dropout"],
            "layer_drop": settings["layerdrop"],
            "norm": "pre" if settings["do_stable_layer_norm"] else "post",
            "position_kernel_size": settings["num_conv_pos_embeddings"],
            "position_groups": settings["num_conv_pos_embedding_groups"],
            "eps": settings["layer_norm_eps"],
        },
    }


def encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an encoder; what else a folder holds (heads of any task) is left out.

    Arguments
    ---------
    weights : mapping of str to Tensor
        Of a ``Wav2Vec2Model``, or of a model that holds one as ``wav2vec2``. Meta tensors will do.

    Returns
    -------
    dict
        For the :class:`~speechbrain_bestrq.encoder.SpeechEncoder` of :func:`encoder_description`.

    Raises
    ------
    InputError
        If a weight of the encoder has no place here, or one of a query-key-value triple is missing.

    Example
    -------
    >>> sorted(encoder_weights({"masked_spec_embed": torch.ones(8), "encoder.layer_norm.bias": torch.ones(8)}))
    ['encoder.norm.bias', 'subsampling.mask_embedding']
    """
    converted, triples = {}, {}
    inner = [name for name in weights if name.startswith("wav2vec2.")] or list(weights)
    for name in inner:
        theirs = name.removeprefix("wav2vec2.")
        for old, new in _OLD_WEIGHT_NORM.items():
            theirs = theirs.replace(old, new)
        if theirs == _MASK_EMBEDDING:
            converted["subsampling.mask_embedding"] = weights[name]
            continue
        projection = re.fullmatch(r"encoder\.layers\.(\d+)\.attention\.([qkv])_proj\.(weight|bias)", theirs)
        if projection:
            number, which, suffix = projection.groups()
            triples.setdefault((number, suffix), {})[which] = weights[name]
            continue
        ours = _rename(theirs, _ENCODER_NAMES)
        if ours is None:
            raise InputError(f"weights: {name!r:.80} is of no wav2vec 2.0 encoder that this project knows.")
        converted[ours] = weights[name]
    for (number, suffix), parts in triples.items():
        if len(parts) < 3 or len({part.shape for part in parts.values()}) > 1:
            raise InputError(f"weights: layer {number} has no whole q_proj, k_proj and v_proj: copy the folder again.")
        converted[f"{_OUR_QKV.format(number)}.{suffix}"] = torch.cat([parts[which] for which in "qkv"])
    return converted


def pretraining_weights(weights: Mapping[str, Tensor], groups: int) -> dict[str, Tensor]:
    """Rename all weights of a ``Wav2Vec2ForPreTraining``.

    Arguments
    ---------
    weights : mapping of str to Tensor
        Of the model.
    groups : int
        Of its quantizer.

    Returns
    -------
    dict
        For :class:`~speechbrain_bestrq.wav2vec2.Wav2Vec2`.

    Raises
    ------
    InputError
        As :func:`encoder_weights`, or if a weight outside the encoder has no place here.
    """
    converted = {f"{_ENCODER}{name}": weight for name, weight in encoder_weights(weights).items()}
    mask_embedding = converted.pop(f"{_ENCODER}subsampling.mask_embedding", None)
    if mask_embedding is not None:
        converted["mask_embedding"] = mask_embedding
    for name, weight in weights.items():
        if name.startswith("wav2vec2."):
            continue
        ours = _rename(name, _HEAD_NAMES)
        if ours is None:
            raise InputError(f"weights: {name!r:.80} is of no wav2vec 2.0 pre-training model.")
        converted[ours] = weight.reshape(groups, -1, weight.shape[-1]) if ours == "quantizer.codebooks" else weight
    return converted


def transformers_weights(weights: Mapping[str, Tensor], pretraining: bool) -> dict[str, Tensor]:
    """Rename our weights to theirs: the inverse of :func:`pretraining_weights` or :func:`encoder_weights`.

    Arguments
    ---------
    weights : mapping of str to Tensor
        Of a :class:`~speechbrain_bestrq.wav2vec2.Wav2Vec2` or a ``SpeechEncoder``.
    pretraining : bool
        Which of the two.

    Returns
    -------
    dict
    """
    encoder_names, head_names = (
        {ours: theirs for theirs, ours in names.items()} for names in (_ENCODER_NAMES, _HEAD_NAMES)
    )
    inside, prefix = (_ENCODER, "wav2vec2.") if pretraining else ("", "")
    converted = {}
    for name, weight in weights.items():
        own = name.removeprefix(inside)
        if own in ("mask_embedding", "subsampling.mask_embedding"):
            converted[prefix + _MASK_EMBEDDING] = weight
        elif pretraining and not name.startswith(inside):
            codebooks = name == "quantizer.codebooks"
            converted[_rename(name, head_names)] = weight.reshape(1, -1, weight.shape[-1]) if codebooks else weight
        elif ".attention.qkv." in own:
            number, suffix = re.fullmatch(r"encoder\.layers\.(\d+)\.attention\.qkv\.(\w+)", own).groups()
            for which, part in zip("qkv", weight.chunk(3), strict=True):
                converted[f"{prefix}{_QKV.format(number, which)}.{suffix}"] = part
        else:
            converted[prefix + _rename(own, encoder_names)] = weight
    return converted


def _rename(name: str, names: Mapping[str, str]) -> str | None:
    """Give the other name of a weight; None if there is none."""
    number = re.search(r"(?<=layers\.)\d+|(?<=convolutions\.)\d+|(?<=norms\.)\d+", name)
    pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
    for suffix in (".weight", ".bias", ""):
        stem = pattern.removesuffix(suffix)
        if pattern.endswith(suffix) and stem in names:
            return names[stem].replace("{}", number[0] if number else "") + suffix
    return None
