"""wav2vec 2.0 models from and to folders of Hugging Face's transformers, which need not be installed."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from speechbrain_bestrq.artefact import CONFIG_FILE, WEIGHTS_FILE, build_encoder, load_encoder
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor
from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.safe_reading import check_sizes, file_inside, read_json, read_shapes
from speechbrain_bestrq.transformer import TransformerEncoder
from speechbrain_bestrq.transformers_names import (
    DEFAULTS,
    PREPROCESSOR_FILE,
    encoder_description,
    is_pretraining_model,
    is_transformers_config,
    normalizes_input,
    pretraining_weights,
    settings_of,
    transformers_weights,
)
from speechbrain_bestrq.wav2vec2 import Wav2Vec2

logger = logging.getLogger(__name__)

#: Share of the frames: less is no mask of a pre-training.
LEAST_MASKED = 0.2


def from_transformers(folder: str | os.PathLike) -> Wav2Vec2 | SpeechEncoder:
    """Load a wav2vec 2.0 model of transformers; nothing in the folder is run.

    The feature penalty, the scale of the features' gradient and the temperatures, of
    which transformers knows nothing, are those of :class:`Wav2Vec2` and
    :class:`GumbelQuantizer` by default. Masks are those of the folder's ``mask_time_prob``, which most models
    have for fine-tuning, where far less is masked: a warning says so.

    Arguments
    ---------
    folder : str or Path
        With config.json and model.safetensors, as ``save_pretrained`` writes them, and
        perhaps preprocessor_config.json, which says whether waveforms are normalised
        (without it: those of models with layer norm in the convolutions are).

    Returns
    -------
    Wav2Vec2 or SpeechEncoder
        Of a ``Wav2Vec2ForPreTraining`` the whole model, of every other the encoder; in
        eval mode, on the CPU.

    Raises
    ------
    InputError
        If a file is missing, or the model is no wav2vec 2.0 or has parts that are not
        known here.
    """
    folder = Path(folder)
    config_path, weights_path = (file_inside(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    config, shapes = read_json(config_path), read_shapes(weights_path)
    if not is_transformers_config(config):
        raise InputError(f"{config_path} is of no wav2vec 2.0 model of transformers: its model_type must be wav2vec2.")
    if not is_pretraining_model(shapes):
        return load_encoder(folder)
    try:
        description = encoder_description(config, normalizes_input(folder, config), keep_mask_embedding=False)
        check_sizes(description, len(shapes))
        converted = pretraining_weights(load_file(weights_path), settings_of(config)["num_codevector_groups"])
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):  # takes no memory, whatever sizes a stranger's description gives
                described = _build(description, settings_of(config)).state_dict()
            if different := sorted(described.keys() ^ converted.keys()):
                raise ValueError(f"{different[0]} is in one of them only")
            for name, tensor in converted.items():
                if described[name].shape != tensor.shape:
                    raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(described[name].shape)}")
            model = _build(description, settings_of(config))
        model.load_state_dict(converted)
        if model.masking.expected_share < LEAST_MASKED:
            logger.warning(
                "%s masks %.0f %% of the frames, as one does in fine-tuning: to pre-train on, set model.masking to "
                "SpanMasking(0.065, 10, min_spans=2), wav2vec 2.0's own.",
                folder,
                100 * model.masking.expected_share,
            )
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{folder}: {error}") from error
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{weights_path} does not fit {CONFIG_FILE} ({reason}).") from error
    return model.eval()


def _build(description: dict[str, Any], settings: Mapping[str, Any]) -> Wav2Vec2:
    """Build a pre-training model, untrained, from what transformers says of it."""
    span = settings["mask_time_length"]
    # theirs is the share of frames that would be masked if no spans overlapped
    masking = SpanMasking(settings["mask_time_prob"] / span, span, settings["mask_time_min_masks"])
    return Wav2Vec2(
        build_encoder(description),
        GumbelQuantizer(
            description["subsampling"]["num_features"],
            code_dim=settings["codevector_dim"],
            codebook_size=settings["num_codevectors_per_group"],
            num_groups=settings["num_codevector_groups"],
        ),
        masking,
        target_dim=settings["proj_codevector_dim"],
        num_negatives=settings["num_negatives"],
        logit_temperature=settings["contrastive_logits_temperature"],
        diversity_weight=settings["diversity_loss_weight"],
        quantizer_dropout=settings["feat_quantizer_dropout"],
    )


def to_transformers(model: Wav2Vec2 | SpeechEncoder, folder: str | os.PathLike) -> Path:
    """Write a model as a folder that ``from_pretrained`` of transformers loads.

    Arguments
    ---------
    model : Wav2Vec2 or SpeechEncoder
        Becomes a ``Wav2Vec2ForPreTraining``, or a ``Wav2Vec2Model``.
    folder : str or Path
        Where to; made, and must not hold a model.

    Returns
    -------
    Path
        The folder, with config.json, model.safetensors and preprocessor_config.json.

    Raises
    ------
    InputError
        If the encoder is none that transformers has, or the folder holds a model.
    """
    folder = Path(folder)
    pretraining = isinstance(model, Wav2Vec2)
    encoder = model.speech_encoder if pretraining else model
    if not isinstance(encoder.frontend, ConvFeatureExtractor) or not isinstance(encoder.encoder, TransformerEncoder):
        raise InputError("transformers has no such model: only encoders of wav2vec 2.0 can be written for it.")
    if encoder.encoder.config["positions"] != "convolution":
        raise InputError("transformers has no sinusoidal positions: only encoders with positions='convolution' fit.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists():
            raise InputError(f"{folder / name} is there already: give a new folder.")
    weights = transformers_weights(model.state_dict(), pretraining)
    config = {**DEFAULTS, **_encoder_settings(encoder)}
    if pretraining:
        config |= _pretraining_settings(model)
    elif not encoder.subsampling.config["keep_mask_embedding"]:
        config["mask_time_prob"] = 0.0  # else transformers would make a vector for masked frames
    config |= {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2ForPreTraining" if pretraining else "Wav2Vec2Model"],
    }
    preprocessor = {
        "do_normalize": encoder.frontend.normalize_input,
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": encoder.frontend.config["norm"] == "layer",
        "sampling_rate": encoder.frontend.sample_rate,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((CONFIG_FILE, config), (PREPROCESSOR_FILE, preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # separate memory for each: parts of one tensor cannot be saved
    weights = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # safetensors writes files that only their owner can read
    shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    return folder


def _encoder_settings(speech_encoder: SpeechEncoder) -> dict[str, Any]:
    """What transformers calls an encoder's settings."""
    frontend, subsampling, encoder = (
        part.config for part in (speech_encoder.frontend, speech_encoder.subsampling, speech_encoder.encoder)
    )
    if subsampling["eps"] != encoder["eps"]:
        raise InputError("transformers has one layer_norm_eps: that of the projection and of the encoder must be one.")
    return {
        "hidden_size": encoder["d_model"],
        "num_hidden_layers": encoder["num_layers"],
        "num_attention_heads": encoder["num_heads"],
        "intermediate_size": encoder["d_ffn"],
        "hidden_dropout": encoder["dropout"],
        "activation_dropout": encoder["activation_dropout"],
        "attention_dropout": encoder["attention_dropout"],
        "feat_proj_dropout": subsampling["dropout"],
        "layerdrop": encoder["layer_drop"],
        "layer_norm_eps": encoder["eps"],
        "feat_extract_norm": frontend["norm"],
        "conv_dim": frontend["channels"],
        "conv_stride": frontend["strides"],
        "conv_kernel": frontend["kernel_sizes"],
        "conv_bias": frontend["bias"],
        "num_conv_pos_embeddings": encoder["position_kernel_size"],
        "num_conv_pos_embedding_groups": encoder["position_groups"],
        "do_stable_layer_norm": encoder["norm"] == "pre",
    }


def _pretraining_settings(model: Wav2Vec2) -> dict[str, Any]:
    """What transformers calls the settings of pre-training."""
    if model.masking.grid:
        raise InputError("transformers has no masks on a grid: export the encoder alone, or train without grid.")
    return {
        "feat_quantizer_dropout": model.quantizer_dropout.p,
        "mask_time_prob": model.masking.prob * model.masking.span,
        "mask_time_length": model.masking.span,
        "mask_time_min_masks": model.masking.min_spans,
        "num_codevectors_per_group": model.quantizer.codebook_size,
        "num_codevector_groups": model.quantizer.num_groups,
        "codevector_dim": model.quantizer.code_dim,
        "proj_codevector_dim": model.target_head.out_features,
        "num_negatives": model.num_negatives,
        "contrastive_logits_temperature": model.logit_temperature,
        "diversity_loss_weight": model.diversity_weight,
    }
