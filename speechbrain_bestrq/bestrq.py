"""BEST-RQ: predict the quantized features behind a mask (arXiv 2202.01855, 2405.04296)."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_bestrq.accounting import code_statistics
from speechbrain_bestrq.artefact import encoder_config
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking
from speechbrain_bestrq.pretraining_model import IGNORED, OBJECTIVE, PretrainingModel, PretrainingOutput
from speechbrain_bestrq.quantizer import FrameQuantizer


class BestRQ(PretrainingModel):
    """BEST-RQ pre-training model.

    The normalised features of the masked frames are replaced by noise; the encoder
    sees the rest, and a linear head predicts, for masked frames only, the labels that
    the quantizer gave to the clean features (four stacked frames each).

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        What is trained, and kept afterwards.
    quantizer : FrameQuantizer
        Gives the labels: RandomProjectionQuantizer, CentroidQuantizer.
    masking : SpanMasking
        Draws the masks that :meth:`forward` is not given.
    noise_deviation : float
        Standard deviation of the filler, in normalised feature space.
    codebook_states : sequence of int, optional
        For each codebook, the number of the hidden state that predicts its labels, 1 to the number of layers,
        which at least one has to have; the last one for all if left out. Labels of different kinds need not share
        a state: what tells the speaker can be asked of a lower one than what is said.

    Example
    -------
    >>> from speechbrain_bestrq.encoder import ConformerEncoder
    >>> from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
    >>> from speechbrain_bestrq.quantizer import RandomProjectionQuantizer
    >>> model = BestRQ(
    ...     SpeechEncoder(
    ...         LogMel(normalize="utterance"),
    ...         ConvSubsampling(d_model=16),
    ...         ConformerEncoder(d_model=16, num_layers=2, num_heads=2, d_ffn=32),
    ...     ),
    ...     RandomProjectionQuantizer(320, codebook_size=64),
    ...     SpanMasking(prob=0.6, span=1, grid=True),
    ... )
    >>> output = model(torch.randn(2, 16000))
    >>> output.loss.shape, output.num_targets
    (torch.Size([]), 30)
    >>> hidden, lengths = model.encode(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> hidden.shape
    torch.Size([3, 2, 25, 16])
    """

    def __init__(
        self,
        speech_encoder: SpeechEncoder,
        quantizer: FrameQuantizer,
        masking: SpanMasking,
        noise_deviation: float = 0.1,
        codebook_states: Sequence[int] | None = None,
    ):
        super().__init__(speech_encoder, masking)
        frontend = speech_encoder.frontend
        if quantizer.input_dim != frontend.stack * frontend.num_mels:
            raise ValueError(
                f"the quantizer's input_dim is {quantizer.input_dim}, but {frontend.stack} stacked frames of "
                f"{frontend.num_mels} features are {frontend.stack * frontend.num_mels}."
            )
        layers, books = len(speech_encoder.encoder.layers), quantizer.num_codebooks
        states = [layers] * books if codebook_states is None else list(codebook_states)
        if len(states) != books or not all(1 <= state <= layers for state in states) or layers not in states:
            raise ValueError(
                f"codebook_states names a hidden state, 1 to {layers}, for each of {books} codebooks, the last for one "
                f"at least, so that every layer is trained; not {states}."
            )
        predicted, place = [], 0
        for one in getattr(quantizer, "quantizers", []):
            predicted.append((one.settings(), states[place : place + one.num_codebooks]))
            place += one.num_codebooks
        if any(one == other for one, other in itertools.combinations(predicted, 2)):
            raise ValueError(
                "two quantizers are the same, and their labels are predicted from the same state: give them different "
                "seeds, or codebook_states that differ."
            )
        self.quantizer, self.noise_deviation, self.codebook_states = quantizer, noise_deviation, states
        self.head = nn.Linear(speech_encoder.encoder.d_model, quantizer.num_codebooks * quantizer.codebook_size)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        wavs: Tensor,
        wav_lens: Tensor | None = None,
        *,
        mask: MaskedFrames | Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PretrainingOutput:
        """Compute the loss of a batch.

        Arguments
        ---------
        wavs : Tensor
            Waveforms in [-1, 1], shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.
        mask : MaskedFrames or Tensor, optional
            Masked encoder frames; a boolean (B, T) makes the host wait for a GPU. Drawn
            by ``masking`` if left out.
        noise : Tensor, optional
            Filler, shape (B, 4 T, num_mels); drawn if left out.
        generator : torch.Generator, optional
            Draws the noise, and a mask that was left out; on the device of ``wavs``.

        Returns
        -------
        PretrainingOutput
            With the metrics "correct" (hits over the masked frames and codebooks),
            "label_counts" and "frames".
        """
        features, feature_lengths = self.speech_encoder.frontend(wavs, wav_lens)
        batch, long, _ = features.shape
        factor = self.speech_encoder.subsampling.factor
        frames = long // factor
        lengths = None if feature_lengths is None else feature_lengths // factor
        mask = self._masked_frames(mask, (batch, frames), lengths, wavs.device, generator)

        labels = self._label(features, lengths, mask, factor)
        if noise is None:
            noise = torch.randn(features.shape, generator=generator, device=wavs.device) * self.noise_deviation
        hidden_frames = mask.mask.repeat_interleave(factor, dim=1, output_size=long)[..., None]
        states = self.speech_encoder.encode_features(torch.where(hidden_frames, noise, features), lengths)

        logits = self._logits(states, mask.indices.clamp(min=0)).flatten(0, 1)
        targets = max(mask.count, 1) * self.quantizer.num_codebooks
        loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / targets
        metrics = self._metrics(logits, labels, batch, frames, lengths)
        return PretrainingOutput(loss, mask.count, (batch, frames), metrics)

    def _logits(self, states: Sequence[Tensor], indices: Tensor) -> Tensor:
        """Scores of the codes for the frames at these indices, shape (K, num_codebooks, codebook_size)."""
        frames = {state: states[state].flatten(0, 1).index_select(0, indices) for state in set(self.codebook_states)}
        books = (self.quantizer.num_codebooks, self.quantizer.codebook_size)
        if len(frames) == 1:
            return self.head(frames[self.codebook_states[0]]).unflatten(1, books)
        weights, biases = self.head.weight.unflatten(0, books), self.head.bias.unflatten(0, books)
        scores = [
            nn.functional.linear(frames[state], weight, bias)
            for state, weight, bias in zip(self.codebook_states, weights, biases, strict=True)
        ]
        return torch.stack(scores, dim=1)

    def _label(self, features: Tensor, lengths: Tensor | None, mask: MaskedFrames, factor: int) -> Tensor:
        """Labels of the masked frames, int64, shape (K, num_codebooks); IGNORED where indices fill up."""
        stacked = self.quantizer.prepare(features.unflatten(1, (-1, factor)).flatten(2), lengths)
        indices = mask.indices.clamp(min=0)
        if self.quantizer.pointwise:
            labels = self.quantizer.label(stacked.flatten(0, 1).index_select(0, indices))
        else:
            labels = self.quantizer.label(stacked).flatten(0, 1).index_select(0, indices)
        return labels.masked_fill((mask.indices < 0)[:, None], IGNORED)

    @torch.no_grad()
    def _metrics(
        self, logits: Tensor, labels: Tensor, batch: int, frames: int, lengths: Tensor | None
    ) -> dict[str, Tensor]:
        """Sums over the batch, without a wait for the device."""
        real = (labels != IGNORED).float()
        counts = torch.zeros(self.quantizer.num_codebooks, self.quantizer.codebook_size, device=labels.device)
        counts.scatter_add_(1, labels.clamp(min=0).t(), real.t())
        return {
            "correct": (logits.max(-1).indices == labels.flatten()).sum(),  # faster than argmax on a CPU
            "label_counts": counts,
            "frames": torch.full((), batch * frames, device=labels.device) if lengths is None else lengths.sum(),
        }

    @property
    def labels_per_target(self) -> int:
        """Labels of a masked frame."""
        return self.quantizer.num_codebooks

    @property
    def measured(self) -> bool:
        """Whether all statistics of the training audio are there."""
        return self.speech_encoder.frontend.measured and self.quantizer.measured

    @torch.no_grad()
    def measure(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Set the statistics that labels rest on, and the head's bias, once, before the first step.

        The bias becomes the logarithm of the labels' frequencies, so that the first loss
        is near their unigram cross-entropy. From a bias of zero, which moves by a learning
        rate an update, the model learns the frequencies through a constant in its hidden
        states first, and small ones stay there (docs/LOG.md).

        Arguments
        ---------
        batches : sequence of (wavs, wav_lens)
            Training audio. Gone through three times: whitening is that of normalised
            features, and labels are those of whitened ones.
        """
        if not self.speech_encoder.frontend.measured:
            self.speech_encoder.frontend.measure(batches)
        if not self.quantizer.measured:
            stacked = self._stacked_frames(batches)
            self.quantizer.fit(frames if real is None else frames[real] for frames, real in stacked)
        counts = torch.ones_like(self.head.bias).view(self.quantizer.num_codebooks, -1)  # none is impossible
        for frames, real in self._stacked_frames(batches):
            labels = self.quantizer.label(frames)
            labels = labels.flatten(0, -2) if real is None else labels[real]
            counts.scatter_add_(1, labels.t(), torch.ones_like(labels.t(), dtype=counts.dtype))
        self.head.bias.copy_((counts / counts.sum(1, keepdim=True)).log().flatten())

    def _stacked_frames(
        self, batches: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """What the quantizer labels, shape (B, T, input_dim), and where that is no padding, (B, T), or None."""
        frontend = self.speech_encoder.frontend
        for wavs, wav_lens in batches:
            features, lengths = frontend(wavs.to(self.head.weight.device), wav_lens)
            lengths = None if lengths is None else lengths // frontend.stack
            stacked = self.quantizer.prepare(features.unflatten(1, (-1, frontend.stack)).flatten(2), lengths)
            yield stacked, None if lengths is None else valid_frames(lengths, stacked.shape[1])

    def statistics(self, loss: Tensor, label_counts: Tensor) -> dict[str, Tensor]:
        """Use of the codes, and the gain: how far the loss is below the labels' unigram cross-entropy, nats."""
        codes = code_statistics(label_counts)
        return {**codes, "gain": codes["unigram_entropy"] - loss}

    def signature(self) -> dict[str, Any]:
        """Describe, as plain JSON, what a checkpoint must agree with to be loaded."""
        return {
            "model": type(self).__name__,
            **encoder_config(self.speech_encoder),
            "quantizer": self.quantizer.settings(),
            "codebook_states": self.codebook_states,
            OBJECTIVE: {"masking": self.masking.settings(), "noise_deviation": self.noise_deviation},
        }

    def flops(self, utterances: int, frames: int, targets: int) -> float:
        """Floating-point operations of one training step (forward and twice that backward), analytic.

        Arguments
        ---------
        utterances, frames : int
            Shape of the batch in encoder frames.
        targets : int
            Masked frames.

        Returns
        -------
        float
            Matrix products and convolutions of the encoder and the head; the front end
            and the quantizer, which have no backward pass, are under 0.3 %.
        """
        encoder = self.speech_encoder.encoder.flops(utterances, frames)
        subsampling = self.speech_encoder.subsampling.flops(utterances * frames)
        return 3.0 * (encoder + subsampling + 2.0 * targets * self.head.weight.numel())
