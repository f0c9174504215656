"""wav2vec 2.0: tell the quantized frame behind a mask from others of the utterance (arXiv 2006.11477)."""

from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_bestrq.accounting import code_statistics
from speechbrain_bestrq.artefact import encoder_config
from speechbrain_bestrq.contrastive import contrastive_loss, sample_negatives
from speechbrain_bestrq.encoder import SpeechEncoder
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer, code_shares, mean_shares, perplexity
from speechbrain_bestrq.masking import MaskedFrames, SpanMasking
from speechbrain_bestrq.pretraining_model import OBJECTIVE, PretrainingModel, PretrainingOutput


class Wav2Vec2(PretrainingModel):
    """wav2vec 2.0 pre-training model.

    The projected features of the masked frames are replaced by a learned vector; the
    encoder sees the rest, and its output at each masked frame has to be nearer to the
    quantized features of that frame than to those of other masked frames of the
    utterance. The loss is

        contrastive + diversity_weight * (G V - perplexity) / (G V) + penalty_weight * penalty

    with the contrastive loss a mean over the masked frames, the perplexity that of the
    codes' mean probabilities over the masked frames of this batch (in eval mode: of
    the chosen codes), and the penalty the mean square of the convolutions' output. Times
    the number of masked frames it is the sum that fairseq and transformers
    minimise. Among batches it weighs by its masked frames; the perplexity is that of each
    batch by itself, so that several ranks or micro-batches equal one that goes through
    the same batches, not one batch of all their utterances.

    Arguments
    ---------
    speech_encoder : SpeechEncoder
        Of a :class:`~speechbrain_bestrq.feature_extractor.ConvFeatureExtractor`, a
        :class:`~speechbrain_bestrq.feature_extractor.FeatureProjection` and an encoder.
    quantizer : GumbelQuantizer
        Gives the targets; its ``input_dim`` is the number of features.
    masking : SpanMasking
        Draws the masks that :meth:`forward` is not given.
    target_dim : int
        Size in which predictions and targets are compared.
    num_negatives : int
        Distractors K of a masked frame.
    logit_temperature : float
        Cosines are divided by it.
    diversity_weight, penalty_weight : float
        Of the other two terms of the loss.
    feature_gradient_scale : float
        The gradient that reaches the convolutions is multiplied by it.
    quantizer_dropout : float
        Of what the quantizer gets.

    Example
    -------
    >>> from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
    >>> from speechbrain_bestrq.transformer import TransformerEncoder
    >>> model = Wav2Vec2(
    ...     SpeechEncoder(
    ...         ConvFeatureExtractor(channels=(16,) * 7),
    ...         FeatureProjection(16, 32),
    ...         TransformerEncoder(d_model=32, num_layers=2, num_heads=2, d_ffn=64),
    ...     ),
    ...     GumbelQuantizer(16, code_dim=16, codebook_size=8),
    ...     SpanMasking(prob=0.065, span=10, min_spans=2),
    ...     target_dim=16,
    ... )
    >>> mask = torch.zeros(2, 49, dtype=torch.bool)
    >>> mask[:, 10:30] = True
    >>> output = model(torch.randn(2, 16000), mask=mask)
    >>> output.loss.shape, output.num_targets
    (torch.Size([]), 40)
    >>> hidden, lengths = model.encode(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> hidden.shape
    torch.Size([3, 2, 49, 32])
    """

    loss_terms = ("contrastive_loss", "diversity_loss", "feature_penalty", "information")
    #: Neither the loss nor the accuracy: the fewer codes are in use, the easier both get.
    chosen_by = "information"

    def __init__(
        self,
        speech_encoder: SpeechEncoder,
        quantizer: GumbelQuantizer,
        masking: SpanMasking,
        target_dim: int = 256,
        num_negatives: int = 100,
        logit_temperature: float = 0.1,
        diversity_weight: float = 0.1,
        penalty_weight: float = 10.0,
        feature_gradient_scale: float = 0.1,
        quantizer_dropout: float = 0.1,
    ):
        super().__init__(speech_encoder, masking)
        num_features = speech_encoder.subsampling.config["num_features"]
        if quantizer.input_dim != num_features:
            raise ValueError(
                f"the quantizer's input_dim is {quantizer.input_dim}, but there are {num_features} features."
            )
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, not {num_negatives}.")
        self.quantizer = quantizer
        self.num_negatives, self.logit_temperature = num_negatives, logit_temperature
        self.diversity_weight, self.penalty_weight = diversity_weight, penalty_weight
        self.feature_gradient_scale = feature_gradient_scale
        self.mask_embedding = nn.Parameter(torch.rand(speech_encoder.encoder.d_model))
        self.quantizer_dropout = nn.Dropout(quantizer_dropout)
        self.prediction_head = nn.Linear(speech_encoder.encoder.d_model, target_dim)
        self.target_head = nn.Linear(quantizer.code_dim, target_dim)

    def forward(
        self,
        wavs: Tensor,
        wav_lens: Tensor | None = None,
        *,
        mask: MaskedFrames | Tensor | None = None,
        noise: None = None,
        negatives: Tensor | None = None,
        gumbel: Tensor | None = None,
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
        noise : None
            Part of the call that all pre-training models share; masked frames get a
            learned vector here.
        negatives : Tensor, optional
            Distractors as :func:`~speechbrain_bestrq.contrastive.sample_negatives` draws
            them, int64, shape (K, N); drawn if left out.
        gumbel : Tensor, optional
            Noise of the quantizer in training, shape (K, G, V); drawn if left out.
        generator : torch.Generator, optional
            Draws what was left out; on the device of ``wavs``.

        Returns
        -------
        PretrainingOutput
            With the metrics "correct" (masked frames found among their distractors),
            "label_counts" (shape (2, G, V): how often each code was chosen, and the sums
            of the probabilities), "frames" and the terms of the loss.

        Raises
        ------
        ValueError
            If the mask has another shape than the batch, or ``noise`` is given.
        """
        if noise is not None:
            raise ValueError("noise must be None: wav2vec 2.0 fills masked frames with a learned vector.")
        encoder = self.speech_encoder
        features, lengths = encoder.frontend(wavs, wav_lens)
        if features.requires_grad and self.feature_gradient_scale != 1.0:
            features = _ScaleGradient.apply(features, self.feature_gradient_scale)
        batch, frames, _ = features.shape
        masked = self._masked_frames(mask, (batch, frames), lengths, wavs.device, generator)
        penalty = self._penalty(features, lengths)
        features = encoder.subsampling.normalize(features)
        hidden = encoder.subsampling.project(features)
        hidden = torch.where(masked.mask[..., None], self.mask_embedding.to(hidden.dtype), hidden)
        hidden = encoder.encoder(hidden, lengths)[-1]

        place, real = masked.indices.clamp(min=0), masked.indices >= 0
        targets = self.quantizer_dropout(features.flatten(0, 1).index_select(0, place))
        quantized = self.quantizer(targets, gumbel, generator)
        if negatives is None:
            negatives = sample_negatives(masked, self.num_negatives, generator)
        contrastive = contrastive_loss(
            self.prediction_head(hidden.flatten(0, 1).index_select(0, place)),
            self.target_head(quantized.vectors),
            quantized.codes,
            negatives,
            masked,
            self.logit_temperature,
        )
        chosen = code_shares(quantized.codes, real, self.quantizer.codebook_size)
        probable = mean_shares(quantized.probabilities, real)
        all_codes = chosen.numel()
        diversity = 1.0 - perplexity(probable if self.training else chosen) / all_codes
        mean = contrastive.loss / max(masked.count, 1)
        loss = mean + self.diversity_weight * diversity + self.penalty_weight * penalty
        with torch.no_grad():
            metrics = {
                "correct": contrastive.correct,
                "label_counts": torch.stack((chosen, probable)) * masked.count,
                "frames": torch.full((), batch * frames, device=wavs.device) if lengths is None else lengths.sum(),
                "contrastive_loss": mean.detach(),
                "diversity_loss": diversity.detach(),
                "feature_penalty": penalty.detach(),
                "information": contrastive.information / max(masked.count, 1),
            }
        return PretrainingOutput(loss, masked.count, (batch, frames), metrics)

    @staticmethod
    def _penalty(features: Tensor, lengths: Tensor | None) -> Tensor:
        """Mean square of the features (B, T, C) without their padding."""
        if lengths is None:
            return features.float().square().mean()
        valid = valid_frames(lengths, features.shape[1])[..., None]
        return features.float().where(valid, 0.0).square().sum() / (lengths.sum().clamp(min=1) * features.shape[2])

    def start_update(self, update: int) -> None:
        """Set the quantizer's temperature to that of an update, counted from 1."""
        self.quantizer.start_update(update)

    def statistics(self, loss: Tensor, label_counts: Tensor) -> dict[str, Tensor]:
        """Perplexities of the chosen codes and of the mean probabilities, summed over the groups; the temperature."""
        chosen, probable = (code_statistics(counts) for counts in label_counts)
        groups = self.quantizer.num_groups
        return {
            "code_perplexity": chosen["code_perplexity"] * groups,
            "probability_perplexity": probable["code_perplexity"] * groups,
            "codes_used": chosen["codes_used"] * groups,
            "commonest_share": chosen["commonest_share"],
            "temperature": torch.full_like(loss, self.quantizer.temperature),
        }

    def signature(self) -> dict[str, Any]:
        """Describe, as plain JSON, what a checkpoint must agree with to be loaded."""
        quantizer = self.quantizer
        settings = ("code_dim", "codebook_size", "num_groups")
        temperatures = ("first_temperature", "last_temperature", "temperature_decay")
        weights = ("logit_temperature", "diversity_weight", "penalty_weight", "feature_gradient_scale")
        return {
            "model": type(self).__name__,
            **encoder_config(self.speech_encoder),
            "quantizer": {name: getattr(quantizer, name) for name in settings},
            "target_dim": self.target_head.out_features,
            "num_negatives": self.num_negatives,
            OBJECTIVE: {
                "masking": self.masking.settings(),
                "quantizer_dropout": self.quantizer_dropout.p,
                **{name: getattr(quantizer, name) for name in temperatures},
                **{name: getattr(self, name) for name in weights},
            },
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
            Matrix products and convolutions of the whole model, without the look-up of the
            codes and the comparison with the distractors, which are under 1 %.
        """
        encoder = self.speech_encoder
        heads = (self.quantizer.projection, self.prediction_head, self.target_head)
        return 3.0 * (
            encoder.frontend.flops(utterances, frames)
            + encoder.subsampling.flops(utterances * frames)
            + encoder.encoder.flops(utterances, frames)
            + 2.0 * targets * sum(head.weight.numel() for head in heads)
        )


class _ScaleGradient(torch.autograd.Function):
    """The identity; the gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
