"""Training steps that benchmarks compare: this project's, SpeechBrain's BEST-RQ and transformers' wav2vec 2.0.

Each is built on a device, is given resident waveforms once (:meth:`start`), and then takes a whole update on one of
them at a time (:meth:`step`): forward, backward, clipping where its recipe clips, optimizer.
"""

import importlib.util
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from common import RATE
from hyperpyyaml import load_hyperpyyaml
from speechbrain_step import SpeechBrainBestRQ, SpeechBrainBestRQBrain, make_batch
from torch import Tensor

from speechbrain_bestrq.pretraining import PretrainingBrain
from speechbrain_bestrq.pretraining_data import PretrainingBatch

HPARAMS = Path(__file__).resolve().parents[1] / "recipes" / "LibriSpeech" / "pretrain" / "hparams"

#: Sizes of BEST-RQ: the YAML's, and smaller ones for a test.
BESTRQ = {
    "base": {"d_model": 576, "num_layers": 12, "d_ffn": 2048, "codebook_size": 8192},
    "small": {"d_model": 48, "num_layers": 1, "d_ffn": 96, "codebook_size": 256},
}
HEADS = {"base": {"relative": 8, "rotary": 9}, "small": {"relative": 4, "rotary": 4}}
#: Sizes of wav2vec 2.0, likewise.
WAV2VEC2 = {
    "base": {"num_features": 512, "d_model": 768, "num_layers": 12, "num_heads": 12, "d_ffn": 3072},
    "small": {"num_features": 16, "d_model": 32, "num_layers": 1, "num_heads": 4, "d_ffn": 48},
}


class Contender(Protocol):
    """What a benchmark compares."""

    seconds: float
    """Audio in a block: one step on each batch."""

    def start(self, waveforms: list[Tensor]) -> None:
        """Prepare batches of unpadded waveforms, shape (B, N) each, and the optimizer."""

    def step(self, number: int) -> None:
        """Take an update on a batch."""

    def count(self) -> tuple[float, float]:
        """Analytic FLOPs of a block, and its share of masked frames."""


class ResidentBatches(list):
    """Batches that are on the device already; what the Brain asks of a sampler."""

    epoch, position = 1, 0


class Ours:
    """This project's step, of a recipe's YAML, through its Brain.

    Arguments
    ---------
    name : str
        The YAML, without its ending.
    device, precision : str
        As for train.py.
    folder : Path
        For the run's files.
    compiled : bool
        As ``--compile`` does.
    overrides : dict, optional
        Sizes that differ from the YAML's.
    attention : str, optional
        Instead of the YAML's.
    counted : bool
        Only for :meth:`count`, never trained: nothing is measured on audio first.
    """

    def __init__(
        self,
        name: str,
        device: str,
        precision: str,
        folder: Path,
        compiled: bool = False,
        overrides: dict[str, Any] | None = None,
        attention: str | None = None,
        counted: bool = False,
    ):
        text = (HPARAMS / f"{name}.yaml").read_text(encoding="utf-8")
        if attention is not None:
            text = text.replace("attention: rotary", f"attention: {attention}")
        folder = folder / name
        folder.mkdir(exist_ok=True)
        hparams = load_hyperpyyaml(text, {"data_folder": "none", "output_folder": str(folder), **(overrides or {})})
        self.model = hparams["model"]
        # whole layers are dropped or not by chance: a block of some steps would be lucky or not
        self.model.speech_encoder.encoder.layer_drop = 0.0
        if not counted:
            self.model.measure([(0.1 * torch.randn(1, 100 * RATE, generator=torch.Generator().manual_seed(0)), None)])
        every_batch_an_update = {"grad_accumulation_factor": 1, "log_interval": 10**9, "valid_interval": None}
        options = {"device": device, "precision": precision, "compile": compiled, "noprogressbar": True}
        self.brain = PretrainingBrain(
            {"model": self.model},
            hparams["optimizer"],
            {**hparams, **every_batch_an_update},
            {**options, "distributed_backend": "gloo"},
            None,
            {},
        )

    def start(self, waveforms: list[Tensor]) -> None:
        """Prepare the batches with their masks, and the Brain."""
        self.batches = ResidentBatches(self._batch(number, wavs) for number, wavs in enumerate(waveforms))
        self.seconds = sum(batch.seconds for batch in self.batches)
        self.brain.sampler = self.batches
        self.brain.on_fit_start()
        self.brain.modules.train()

    def _batch(self, number: int, wavs: Tensor) -> PretrainingBatch:
        frames = self.model.speech_encoder.num_frames(wavs.shape[1])
        generator = torch.Generator().manual_seed(number)
        masked = self.model.masking(torch.full((len(wavs),), frames), frames, generator)
        return PretrainingBatch(wavs, None, masked, number, number, number, wavs.numel() / RATE, 0.0).to(wavs.device)

    def step(self, number: int) -> None:
        """Take an update on a batch."""
        self.brain.step = 1  # not the last of the epoch
        self.brain.fit_batch(self.batches[number])

    def count(self) -> tuple[float, float]:
        """FLOPs of a block, and its share of masked frames."""
        shapes = [batch.masked.mask.shape for batch in self.batches]
        targets = [batch.masked.count for batch in self.batches]
        flops = sum(self.model.flops(*shape, count) for shape, count in zip(shapes, targets, strict=True))
        return flops, sum(targets) / sum(shape.numel() for shape in shapes)


class SpeechBrainStep:
    """SpeechBrain's BEST-RQ step, through its Brain.

    Arguments
    ---------
    size : str
        "base" or "small".
    device, precision, folder, compiled
        As for :class:`Ours`.
    """

    def __init__(self, size: str, device: str, precision: str, folder: Path, compiled: bool = False):
        sizes = {**BESTRQ[size], "num_heads": HEADS[size]["relative"]}
        # eager whatever is wanted: the FLOPs are those of the equal model of ours
        self.equal = Ours("bestrq", "cpu", "fp32", folder, False, {**sizes, "whiten": None}, "relative", True)
        options = {"device": device, "precision": precision, "max_grad_norm": 10.0}
        if compiled:
            options |= {"compile": True, "compile_module_keys": ["model"]}
        self.brain = SpeechBrainBestRQBrain(
            {"model": SpeechBrainBestRQ(**sizes)},
            lambda parameters: torch.optim.AdamW(
                parameters, lr=8e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.01, fused=True
            ),
            run_opts=options,
        )
        self.brain.modules["model"].compute_features.to(device)

    def start(self, waveforms: list[Tensor]) -> None:
        """Draw the masks by SpeechBrain's function."""
        torch.manual_seed(0)
        self.batches = [make_batch(wavs) for wavs in waveforms]
        self.seconds = sum(wavs.numel() for wavs in waveforms) / RATE
        self.frames = [(len(wavs), (1 + wavs.shape[1] // 160) // 4) for wavs in waveforms]
        self.brain.on_fit_start()
        self.brain.modules.train()

    def step(self, number: int) -> None:
        """Take an update on a batch."""
        self.brain.step = 0
        self.brain.fit_batch(self.batches[number])

    def count(self) -> tuple[float, float]:
        """FLOPs of a block, counted as if only masked frames met the head, and its share of masked frames."""
        targets = [len(wavs) * len(mask) // 4 for wavs, _, mask, _ in self.batches]
        flops = sum(self.equal.model.flops(*shape, count) for shape, count in zip(self.frames, targets, strict=True))
        return flops, sum(targets) / sum(batch * frames for batch, frames in self.frames)


class TransformersStep:
    """The step of transformers' ``Wav2Vec2ForPreTraining`` of the same sizes, with SDPA, by its example's loss.

    Masks are those that :class:`Ours` draws, and negatives are drawn by transformers' own function; as in its
    collation, both lie with the batch. Nothing is clipped, as in wav2vec2.yaml.

    Arguments
    ---------
    size : str
        "base" or "small".
    device, precision, folder, compiled
        As for :class:`Ours`.
    """

    def __init__(self, size: str, device: str, precision: str, folder: Path, compiled: bool = False):
        from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

        sizes = WAV2VEC2[size]
        self.equal = Ours("wav2vec2", "cpu", "fp32", folder, overrides=sizes)  # takes no memory of a GPU
        config = Wav2Vec2Config(
            conv_dim=(sizes["num_features"],) * 7,
            hidden_size=sizes["d_model"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            intermediate_size=sizes["d_ffn"],
            layerdrop=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.1,
            feat_quantizer_dropout=0.1,
            feat_extract_norm="group",
            attn_implementation="sdpa",
        )
        self.model = Wav2Vec2ForPreTraining(config).to(device).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
        )
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast = torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)

    def start(self, waveforms: list[Tensor]) -> None:
        """Draw masks and negatives."""
        from transformers.models.wav2vec2.modeling_wav2vec2 import _sample_negative_indices

        self.equal.start([wavs.cpu() for wavs in waveforms])
        self.seconds, self.batches = self.equal.seconds, []
        for wavs, batch in zip(waveforms, self.equal.batches, strict=True):
            mask = batch.masked.mask
            negatives = _sample_negative_indices(tuple(mask.shape), 100, mask_time_indices=mask.numpy())
            negatives = torch.from_numpy(negatives.astype(np.int64)).to(wavs.device)
            self.batches.append((wavs, mask.to(wavs.device), negatives, batch.masked.count))

    def step(self, number: int) -> None:
        """Take an update on a batch."""
        wavs, mask, negatives, targets = self.batches[number]
        with self.autocast:
            output = self.forward(wavs, mask_time_indices=mask, sampled_negative_indices=negatives)
        (output.loss / targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self) -> tuple[float, float]:
        """FLOPs of a block, those of the equal model of ours, and its share of masked frames."""
        return self.equal.count()


def transformers_is_installed() -> bool:
    """Whether there is a transformers to compare with."""
    return importlib.util.find_spec("transformers") is not None
