"""What the YAMLs set, written down here a second time: the paper's settings, and those that a run starts from."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.centroids import CentroidQuantizer
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer
from speechbrain_bestrq.schedules import WarmupCosine, WarmupLinear, WarmupNoam

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
        "on_nonfinite": "stop",
        "optimizer.__class__": torch.optim.Adam,
        "optimizer.defaults.lr": 8e-4,
        "optimizer.defaults.betas": (0.9, 0.98),
        "optimizer.defaults.eps": 1e-9,
        "optimizer.defaults.weight_decay": 0,
        "lr_schedule.__class__": WarmupNoam,
        "lr_schedule.peak": 8e-4,
        "lr_schedule.warmup_updates": 25_000,
        "frontend.num_mels": 80,
        "frontend.normalize": "global",
        "model.speech_encoder.encoder.d_model": 512,
        "model.speech_encoder.encoder.layers.11.attention.num_heads": 8,
        "model.speech_encoder.encoder.config.attention": "relative",
        "model.speech_encoder.encoder.config.activation": "gelu",
        "model.speech_encoder.encoder.config.dropout": 0.1,
        "model.speech_encoder.encoder.layer_drop": 0.05,
        "model.speech_encoder.subsampling.config.dropout": 0.1,
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
        "spike_ratio": 0.0,
        "on_nonfinite": "stop",
        "remove_vector_weight_decay": False,
        "optimizer.__class__": torch.optim.AdamW,
        "optimizer.defaults.lr": 5e-4,
        "optimizer.defaults.betas": (0.9, 0.999),
        "optimizer.defaults.eps": 1e-6,
        "optimizer.defaults.weight_decay": 0.01,
        "lr_schedule.__class__": WarmupLinear,
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
        "model.penalty_weight": 0.0,
        "model.feature_gradient_scale": 1.0,
        "model.quantizer_dropout.p": 0.0,
        "frontend.config.kernel_sizes": [11, 3, 3, 3, 3, 3, 3],
        "frontend.config.norm": "layer",
        "frontend.normalize_input": True,
        "model.speech_encoder.subsampling.config.dropout": 0.1,
        "model.speech_encoder.encoder.config.dropout": 0.1,
        "model.speech_encoder.encoder.config.attention_dropout": 0.1,
        "model.speech_encoder.encoder.config.activation_dropout": 0.1,
        "model.speech_encoder.encoder.config.norm": "pre",
        "model.speech_encoder.encoder.config.positions": "sinusoidal",
        "model.speech_encoder.encoder.layer_drop": 0.05,
    },
}

#: What a run of one's own starts from, as docs/differences.md and the recipe's README say: BEST-RQ, base.
BESTRQ = {
    "min_seconds": 2.0,
    "max_seconds": 60.0,
    "max_batch_seconds": 800,
    "grad_accumulation_factor": 8,  # on one device
    "statistics_hours": 10.0,
    "optimizer_step_limit": 200_000,
    "precision": "bf16",
    "max_grad_norm": 10.0,
    "spike_ratio": 20.0,
    "max_skipped_updates": 50,
    "on_nonfinite": "rewind",
    "remove_vector_weight_decay": True,
    "optimizer.__class__": torch.optim.AdamW,
    "optimizer.defaults.lr": 8e-4,
    "optimizer.defaults.betas": (0.9, 0.98),
    "optimizer.defaults.eps": 1e-9,
    "optimizer.defaults.weight_decay": 0.01,
    "lr_schedule.__class__": WarmupNoam,
    "lr_schedule.peak": 8e-4,
    "lr_schedule.warmup_updates": 25_000,
    "frontend.num_mels": 80,
    "frontend.normalize": "global",
    "model.speech_encoder.subsampling.config.channels": [128, 32],
    "model.speech_encoder.subsampling.config.dropout": 0.1,
    "model.speech_encoder.encoder.config": {
        "d_model": 576,
        "num_layers": 12,
        "num_heads": 9,
        "d_ffn": 2048,
        "kernel_size": 31,
        "dropout": 0.1,
        "layer_drop": 0.0,
        "attention": "rotary",
        "activation": "gelu",
    },
    "model.masking.prob": 0.205,  # 60 % of the frames
    "model.masking.span": 4,
    "model.masking.grid": False,
    "model.noise_deviation": 0.1,
    "model.codebook_states": [12],
    "model.quantizer.__class__": RandomProjectionQuantizer,
    "model.quantizer.codebook_dim": 16,
    "model.quantizer.codebook_size": 8192,
    "model.quantizer.normalize": "feature",
    "model.quantizer.whiten": 16,
    "model.quantizer.utterance_norm": False,
}
#: wav2vec 2.0, its authors' settings.
WAV2VEC2 = {
    "min_seconds": 2.0,
    "max_seconds": 60.0,
    "max_batch_seconds": 350,
    "grad_accumulation_factor": 16,  # on one device
    "optimizer_step_limit": 400_000,
    "precision": "bf16",
    "max_grad_norm": 0.0,  # not clipped
    "spike_ratio": 20.0,
    "max_skipped_updates": 50,
    "on_nonfinite": "rewind",
    "remove_vector_weight_decay": False,
    "optimizer.__class__": torch.optim.AdamW,
    "optimizer.defaults.lr": 5e-4,
    "optimizer.defaults.betas": (0.9, 0.98),
    "optimizer.defaults.eps": 1e-6,
    "optimizer.defaults.weight_decay": 0.01,
    "lr_schedule.__class__": WarmupLinear,
    "lr_schedule.peak": 5e-4,
    "lr_schedule.warmup_updates": 32_000,
    "lr_schedule.total_updates": 400_000,
    "frontend.config.channels": [512] * 7,
    "frontend.config.kernel_sizes": [10, 3, 3, 3, 3, 2, 2],
    "frontend.config.strides": [5, 2, 2, 2, 2, 2, 2],
    "frontend.config.norm": "group",
    "frontend.config.initial_kernels": "random",
    "frontend.normalize_input": False,
    "model.speech_encoder.subsampling.config.dropout": 0.1,
    "model.speech_encoder.encoder.config": {
        "d_model": 768,
        "num_layers": 12,
        "num_heads": 12,
        "d_ffn": 3072,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "layer_drop": 0.05,
        "norm": "post",
        "positions": "convolution",
        "position_kernel_size": 128,
        "position_groups": 16,
        "eps": 1e-5,
    },
    "model.masking.prob": 0.065,
    "model.masking.span": 10,
    "model.masking.min_spans": 2,
    "model.masking.grid": False,
    "model.quantizer.code_dim": 256,
    "model.quantizer.codebook_size": 320,
    "model.quantizer.num_groups": 2,
    "model.quantizer.first_temperature": 2.0,
    "model.quantizer.last_temperature": 0.5,
    "model.quantizer.temperature_decay": 0.999995,
    "model.target_head.out_features": 256,
    "model.num_negatives": 100,
    "model.logit_temperature": 0.1,
    "model.diversity_weight": 0.1,
    "model.penalty_weight": 10.0,
    "model.feature_gradient_scale": 0.1,
    "model.quantizer_dropout.p": 0.1,
}
#: In what the small YAMLs differ from the base ones of either method, which train in bf16 on any machine.
SMALL = {
    "min_seconds": 0.5,
    "max_seconds": 25.0,
    "max_batch_seconds": 25,
    "grad_accumulation_factor": 1,
    "precision": "the machine's",
    "max_grad_norm": 5.0,
    "remove_vector_weight_decay": True,
    "model.speech_encoder.subsampling.config.dropout": 0.0,
}
STARTING = {
    "bestrq": BESTRQ,
    "bestrq_large": {
        **BESTRQ,
        "max_batch_seconds": 400,
        "grad_accumulation_factor": 4,  # on eight devices
        "optimizer.defaults.lr": 4e-4,
        "lr_schedule.peak": 4e-4,
        "model.speech_encoder.encoder.config": {
            **BESTRQ["model.speech_encoder.encoder.config"],
            **{"d_model": 832, "num_layers": 24, "num_heads": 13, "d_ffn": 3328, "layer_drop": 0.05},
        },
        "model.codebook_states": [24],
    },
    "bestrq_small": {
        **{name: value for name, value in BESTRQ.items() if not name.startswith("model.quantizer")},
        **SMALL,
        "statistics_hours": 1.0,
        "optimizer_step_limit": 24_000,
        "optimizer.defaults.lr": 1.2e-3,
        "lr_schedule.__class__": WarmupCosine,
        "lr_schedule.peak": 1.2e-3,
        "lr_schedule.warmup_updates": 600,
        "lr_schedule.total_updates": 24_000,
        "lr_schedule.final_share": 0.05,
        "model.speech_encoder.subsampling.config.channels": [16, 32],
        "model.speech_encoder.encoder.config": {
            **BESTRQ["model.speech_encoder.encoder.config"],
            **{"d_model": 192, "num_layers": 4, "num_heads": 3, "d_ffn": 1024, "kernel_size": 15, "dropout": 0.0},
        },
        # what is said, from the last state; who says it and how, from the state in the middle
        "model.codebook_states": [4, 2],
        "model.quantizer.quantizers.0.utterance_norm": True,
        "model.quantizer.quantizers.1.utterance_norm": False,
        **{f"model.quantizer.quantizers.{number}.__class__": CentroidQuantizer for number in (0, 1)},
        **{f"model.quantizer.quantizers.{number}.codebook_size": 256 for number in (0, 1)},
        **{f"model.quantizer.quantizers.{number}.num_components": 16 for number in (0, 1)},
    },
    "wav2vec2": WAV2VEC2,
    "wav2vec2_small": {
        **WAV2VEC2,
        **SMALL,
        "optimizer_step_limit": 4000,
        "lr_schedule.warmup_updates": 400,
        "lr_schedule.total_updates": 4000,
        "frontend.config.channels": [128] * 7,
        "frontend.config.initial_kernels": "constant",
        "model.speech_encoder.encoder.config": {
            **WAV2VEC2["model.speech_encoder.encoder.config"],
            **{"d_model": 256, "num_layers": 6, "num_heads": 4, "d_ffn": 1024, "norm": "pre"},
            **{"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0},
        },
        "model.quantizer.code_dim": 128,
        "model.quantizer.temperature_decay": 0.99965,
        "model.target_head.out_features": 128,
        "model.diversity_weight": 1.0,
        "model.penalty_weight": 0.1,
        "model.quantizer_dropout.p": 0.0,
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


def pretraining(name, output):
    """What a YAML of pre-training makes, with an optimizer of something, which has all its options."""
    made = loaded(f"LibriSpeech/pretrain/hparams/{name}.yaml", output, "meta")
    return {**made, "optimizer": made["optimizer"]([torch.nn.Parameter(torch.zeros(1))])}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pre_training(name, tmp_path):
    made = pretraining(name, tmp_path)
    assert {path: found(made, path) for path in PRETRAINING[name]} == PRETRAINING[name]


@pytest.mark.parametrize("name", STARTING)
def test_what_a_pre_training_of_ones_own_starts_from(name, tmp_path, monkeypatch):
    monkeypatch.setattr("speechbrain_bestrq.precision.native_precision", lambda: "the machine's")
    made = pretraining(name, tmp_path)
    assert {path: found(made, path) for path in STARTING[name]} == STARTING[name]


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
        "utterance_norm": False,
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
