"""The YAMLs of the paper have the paper's settings: what makes them its own is written down here a second time."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_bestrq.artefact import save_encoder

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(yaml, output, device="cpu", **overrides):
    """What a YAML makes; on the device "meta" without memory for weights."""
    given = {"data_folder": "none", "output_folder": str(output), **overrides}
    with open(RECIPES / yaml) as file, torch.device(device):
        return load_hyperpyyaml(file, given)


def found(value, path):
    """What lies behind a dotted path of keys, options of a partial function, attributes and places."""
    for name in path.split("."):
        if isinstance(value, partial):
            value = value.keywords
        value = value[int(name)] if name.isdigit() else value[name] if isinstance(value, dict) else getattr(value, name)
    return value


#: By YAML: a dotted path into what it makes, and the paper's or its authors' setting.
PRETRAINING = {
    "bestrq_paper": {
        "train_splits": ["train-clean-100", "train-clean-360", "train-other-500"],
        "min_seconds": 2.0,
        "max_seconds": 60.0,
        "max_batch_seconds": 100,
        "grad_accumulation_factor": 1,  # on eight devices
        "optimizer_step_limit": 200_000,
        "encoder_at_steps": [100_000, 200_000],
        "precision": "fp32",
        "max_grad_norm": 1.0,
        "spike_ratio": 0.0,
        "optimizer.lr": 8e-4,
        "optimizer.betas": (0.9, 0.98),
        "optimizer.eps": 1e-9,
        "lr_schedule.peak": 8e-4,
        "lr_schedule.warmup_updates": 25_000,
        "frontend.num_mels": 80,
        "frontend.normalize": "global",
        "model.speech_encoder.encoder.d_model": 512,
        "model.speech_encoder.encoder.layers.11.attention.num_heads": 8,
        "model.speech_encoder.encoder.layer_drop": 0.05,
        "model.noise_deviation": 0.1,
        "d_ffn": 2048,
        "kernel_size": 31,
        "dropout": 0.1,
    },
    "wav2vec2_paper": {
        "min_seconds": 2.0,
        "max_seconds": 60.0,
        "max_batch_seconds": 100,
        "grad_accumulation_factor": 1,
        "optimizer_step_limit": 200_000,
        "encoder_at_steps": [100_000, 200_000],
        "precision": "fp32",
        "max_grad_norm": 100.0,
        "optimizer.lr": 5e-4,
        "optimizer.weight_decay": 0.01,
        "lr_schedule.peak": 5e-4,
        "lr_schedule.warmup_updates": 30_000,
        "lr_schedule.total_updates": 400_000,
        "d_model": 768,
        "d_ffn": 3072,
        "num_heads": 8,
        "num_layers": 12,
        "codebook_size": 320,
        "num_groups": 2,
        "num_negatives": 100,
        "model.logit_temperature": 0.1,
        "model.diversity_weight": 0.1,
        "model.speech_encoder.encoder.layer_drop": 0.05,
    },
}

#: What all probes of frozen encoders share: the rates of the layers' weights.
MIX = {
    "mix_optimizer.lr": 0.01,
    "mix_annealing.hyperparam_value": 0.01,
    "mix_annealing.annealing_factor": 0.9,
    "cache_features": False,
    "precision": "fp32",
}
ECAPA = {"channels": 512, "pooled_channels": 1536, "attention_channels": 64}
TASKS = {
    "LibriSpeech/ASR/hparams/bestrq.yaml": {
        **MIX,
        "train_splits": ["train-clean-100"],
        "test_splits": ["test-clean", "test-other"],
        "number_of_epochs": 20,
        "head.hidden_size": 1024,
        "head.num_layers": 2,
        "head.dropout": 0.2,
        "head_optimizer.lr": 2e-4,
        "head_annealing.annealing_factor": 0.8,
        "annealing_metric": "loss",
        "beam_size": 143,
        "label_hours": None,
        "utterance_norm": False,
    },
    "VoxCeleb/verification/hparams/bestrq.yaml": {
        **MIX,
        **ECAPA,
        "number_of_epochs": 15,
        "embedding_size": 512,
        "chunk_seconds": 3.0,
        "classifier.margin": 0.2,
        "classifier.scale": 30.0,
        "head_optimizer.lr": 1e-3,
        "learning_rate": 1e-3,
        "final_learning_rate": 1e-4,
        "train_speakers": None,
    },
    "IEMOCAP/emotion/hparams/bestrq.yaml": {
        **MIX,
        **ECAPA,
        "number_of_epochs": 30,
        "embedding_size": 96,
        "folds": "speaker",
        "classes": {"ang": "ang", "exc": "hap", "hap": "hap", "neu": "neu", "sad": "sad"},
        "head_optimizer.lr": 2e-4,
        "head_annealing.annealing_factor": 0.9,
        "class_weights": None,
        "examples_per_class": None,
    },
    "SLURP/intent/hparams/bestrq.yaml": {
        **MIX,
        "number_of_epochs": 20,
        "target": "scenario",
        "head.num_layers": 2,
        "head_optimizer.lr": 2e-4,
        "head_annealing.annealing_factor": 0.8,
        "class_weights": None,
        "examples_per_class": None,
        "utterance_norm": False,
    },
}
FINE_TUNED = {
    "train_splits": ["train-clean-100"],
    "number_of_epochs": 30,
    "max_batch_size": 6,
    "speeds": [95, 100, 105],
    "speed_perturb.speeds": [95, 100, 105],
    "head.hidden_size": 1280,
    "head.num_layers": 3,
    "head.dropout": 0.15,
    "head_optimizer.lr": 3e-4,
    "head_optimizer.weight_decay": 1e-3,
    "encoder_optimizer.lr": 5e-5,
    "encoder_optimizer.weight_decay": 1e-3,
    "head_annealing.annealing_factor": 0.5,
    "encoder_annealing.annealing_factor": 0.7,
    "annealing_metric": "loss",
    "encoder_rest": 0.0,
    "apply_spec_augment": False,
    "speech_encoder.encoder.model.encoder.layer_drop": 0.0,
}


def test_the_table_looks_into_what_a_yaml_makes():
    made = {"optimizer": partial(dict, lr=1.0), "sizes": [3, 4]}
    assert (found(made, "optimizer.lr"), found(made, "sizes.1")) == (1.0, 4)
    with pytest.raises(KeyError):
        found(made, "optimizer.eps")


@pytest.mark.parametrize("name", PRETRAINING)
def test_pre_training(name, tmp_path):
    made = loaded(f"LibriSpeech/pretrain/hparams/{name}.yaml", tmp_path, "meta")
    assert {path: found(made, path) for path in PRETRAINING[name]} == PRETRAINING[name]


def test_labels_and_masks_of_the_papers_bestrq_are_its_codes(tmp_path):
    made = loaded("LibriSpeech/pretrain/hparams/bestrq_paper.yaml", tmp_path, "meta")
    masks, labels = made["model"].masking.settings(), made["model"].quantizer.settings()
    # 15 % of the 10 ms frames start a span of four on a grid: 60 % of the encoder's frames
    assert masks == {"prob": 0.6, "span": 1, "min_spans": 1, "grid": True}
    # normalised over time, as the paper's tables were made
    assert labels == {
        "codebook_dim": 16,
        "codebook_size": 8192,
        "num_codebooks": 1,
        "seed": 1000,
        "normalize": "time",
        "whiten": None,
    }


def test_masks_and_codes_of_the_papers_wav2vec2_are_its_codes(tmp_path):
    model = loaded("LibriSpeech/pretrain/hparams/wav2vec2_paper.yaml", tmp_path, "meta")["model"]
    assert model.masking.settings() == {"prob": 0.065, "span": 10, "min_spans": 2, "grid": False}
    quantizer = model.quantizer
    temperatures = (quantizer.first_temperature, quantizer.last_temperature, quantizer.temperature_decay)
    assert temperatures == (2.0, 0.25, 0.999995)


@pytest.mark.parametrize("yaml", TASKS)
def test_probes_of_frozen_encoders(yaml, tmp_path):
    made = loaded(yaml, tmp_path, encoder="fbank")
    assert {path: found(made, path) for path in TASKS[yaml]} == TASKS[yaml]
    assert made["speech_encoder"].freeze


def test_fine_tuning(make_speech_encoder, tmp_path):
    encoder = save_encoder(make_speech_encoder(normalize="global", layer_drop=0.05), tmp_path / "encoder", "# Card")
    made = loaded("LibriSpeech/ASR/hparams/bestrq_finetune.yaml", tmp_path / "run", encoder=str(encoder))
    assert {path: found(made, path) for path in FINE_TUNED} == FINE_TUNED
    assert not made["speech_encoder"].freeze
    assert {"drop_freq", "drop_chunk", "speed_perturb"} <= made.keys()
