"""What a downstream task listens with: an encoder, pre-trained or not, or filter banks, under one interface."""

import json
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from speechbrain_bestrq.artefact import CONFIG_FILE, encoder_config
from speechbrain_bestrq.digests import tensor_digest, text_digest
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import LogMel, absolute_lengths, normalize_utterances
from speechbrain_bestrq.pretrained import RANDOM_PREFIX, PretrainedEncoder
from speechbrain_bestrq.safe_reading import read_json
from speechbrain_bestrq.sources import find_encoder

logger = logging.getLogger(__name__)

#: The source that is no encoder: log mel features.
FILTERBANK = "fbank"
#: Mel frames of 10 ms in a frame of the filter bank: 25 frames a second, as those of BEST-RQ.
STACKED_FRAMES = 4


class FilterbankEncoder(nn.Module):
    """Log mel features, stacked to 25 frames a second: the baseline without encoder.

    Each utterance has mean 0 and variance 1 over its frames and bins together: loudness is
    gone, the shape of the spectrum, which tells speakers apart, is not. There is nothing to train in it.

    Arguments
    ---------
    num_mels : int
        Bins; a frame of the result has four times as many channels.
    sample_rate : int
        Of the waveforms, Hz.

    Example
    -------
    >>> FilterbankEncoder()(torch.randn(2, 16000), torch.tensor([1.0, 0.5])).shape
    torch.Size([1, 2, 25, 320])
    """

    def __init__(self, num_mels: int = 80, sample_rate: int = 16000):
        super().__init__()
        self.frontend = LogMel(sample_rate=sample_rate, num_mels=num_mels, stack=STACKED_FRAMES)
        # the bins stay as they are
        self.frontend.load_state_dict({"mean": torch.zeros(num_mels), "deviation": torch.ones(num_mels)})
        self.output_dim = STACKED_FRAMES * num_mels

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Compute features of waveforms (B, N), shape (1, B, T, 4 num_mels); zero in the padding."""
        features = normalize_utterances(*self.frontend(wavs, wav_lens))
        return features.unflatten(1, (-1, STACKED_FRAMES)).flatten(2)[None]

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames of so many samples."""
        return self.frontend.num_frames(samples) // STACKED_FRAMES


class TaskEncoder(nn.Module):
    """An encoder of any source: waveforms in, hidden states and their lengths out.

    Arguments
    ---------
    source : str or Path
        "fbank" for :class:`FilterbankEncoder`; else as for
        :class:`speechbrain_bestrq.pretrained.PretrainedEncoder`.
    all_states : bool
        Give the hidden states of all layers instead of the last.
    sample_rate : int
        Of the waveforms that it is given, Hz. An encoder takes the rate that it was trained at, and no other.
    save_path, freeze, **options
        As for :class:`speechbrain_bestrq.pretrained.PretrainedEncoder`. Filter banks
        are always frozen and take none of the options. A pre-trained front end that has weights, wav2vec 2.0's
        convolutions, rests also where the encoder is trained, as in its paper and that of BEST-RQ in SpeechBrain.

    Attributes
    ----------
    freeze : bool
        Whether nothing in it is trained.
    options : dict
        What else was given.
    output_dim : int
        Channels D.
    num_states : int
        Hidden states S that :meth:`forward` gives.

    Raises
    ------
    InputError
        If there is no encoder at the source, it takes another sample rate, or it has no weights to fine-tune.

    Example
    -------
    >>> encoder = TaskEncoder("fbank")
    >>> hidden, lengths = encoder(torch.randn(2, 16000), torch.tensor([1.0, 0.5]))
    >>> hidden.shape, lengths.tolist(), encoder.describe()["method"]
    (torch.Size([1, 2, 25, 320]), [25, 12], 'fbank')
    """

    def __init__(
        self,
        source: str | os.PathLike,
        save_path: str | os.PathLike | None = None,
        all_states: bool = True,
        freeze: bool = True,
        sample_rate: int = 16000,
        **options: Any,
    ):
        super().__init__()
        self.source = os.fspath(source)
        self.options = {"all_states": all_states, **options}
        if self.source == FILTERBANK:
            if not freeze:
                raise InputError("filter banks have no weights to fine-tune: give --encoder an encoder, or freeze.")
            if given := sorted(name for name, value in options.items() if value not in (None, False)):
                raise InputError(f"filter banks have no {given[0]}: leave it out, or give --encoder an encoder.")
            self.freeze, self.encoder, self._facts = True, FilterbankEncoder(sample_rate=sample_rate), {}
            self.num_states = 1
        else:
            self.freeze = freeze
            masks = options.pop("apply_spec_augment", False)
            self.encoder = PretrainedEncoder(source, save_path, freeze=freeze, output_all_hiddens=all_states, **options)
            self.encoder.apply_spec_augment = masks and hasattr(self.encoder.model.frontend, "num_mels")
            if masks and not self.encoder.apply_spec_augment:
                logger.warning("%s takes no mel features: nothing of its input is masked.", self.source)
            own_rate = self.encoder.model.frontend.sample_rate
            if own_rate != sample_rate:
                raise InputError(
                    f"{self.source} was trained on {own_rate} samples per second and is given {sample_rate}: give "
                    f"sample_rate {own_rate}, or another encoder."
                )
            if not self.source.startswith(RANDOM_PREFIX):  # its weights are good as they are, and dear to train
                self.encoder.model.frontend.requires_grad_(False)
            self.num_states = self.encoder.num_layers + 1 if all_states else 1
            folder = find_encoder(self.source.removeprefix(RANDOM_PREFIX), save_path)
            config = read_json(folder / CONFIG_FILE)
            self._facts = config.get("training") or {}
        self.output_dim = self.encoder.output_dim

    def forward(self, wavs: Tensor, wav_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode waveforms.

        Arguments
        ---------
        wavs : Tensor
            In [-1, 1], shape (B, N).
        wav_lens : Tensor, optional
            Relative lengths, shape (B,); None when nothing is padded.

        Returns
        -------
        hidden : Tensor
            Shape (S, B, T, D); zero in the padding.
        lengths : Tensor
            Frames of each utterance, int64, shape (B,), on the device of ``wavs``.
        """
        hidden = self.encoder(wavs, wav_lens)
        if hidden.ndim == 3:
            hidden = hidden[None]
        if wav_lens is None:
            return hidden, torch.full((len(wavs),), hidden.shape[2], device=wavs.device)
        return hidden, self.num_frames(absolute_lengths(wav_lens.to(wavs.device), wavs.shape[1]))

    def num_frames(self, samples: int | Tensor) -> int | Tensor:
        """Frames of so many samples."""
        return self.encoder.num_frames(samples)

    @property
    def architecture(self) -> dict[str, Any]:
        """What the hidden states are a function of, beside the audio and the weights: plain JSON."""
        if self.source == FILTERBANK:
            return {"frontend": self.encoder.frontend.config}
        return encoder_config(self.encoder.model)

    def identity(self) -> dict[str, str]:
        """Digest weights and architecture: equal for encoders that hear the same in the same audio.

        The dropout counts for those that are trained.

        Returns
        -------
        dict
            "encoder" and "architecture": 16 hexadecimal digits each.
        """
        parts = {
            part: {
                name: value
                for name, value in settings.items()
                if not (self.freeze and name.endswith(("dropout", "layer_drop")))
            }
            for part, settings in self.architecture.items()
            if isinstance(settings, dict)
        }
        architecture = json.dumps(parts, sort_keys=True)
        return {"encoder": tensor_digest(self.state_dict()), "architecture": text_digest(architecture)}

    def describe(self) -> dict[str, Any]:
        """Say what this is, for the records.

        Returns
        -------
        dict
            "source"; "method": "fbank", or the pre-training model, with "random" before it
            if its weights are; "parameters"; and, of a pre-trained encoder, what its folder says of
            "corpus", "train_hours" of it, "updates", "audio_hours" heard and "device_hours", None where it says
            nothing; of one that is trained
            "masked", whether parts of its features are.
        """
        facts: dict[str, Any] = {"source": self.source, "parameters": sum(p.numel() for p in self.parameters())}
        if self.source == FILTERBANK:
            return facts | {"method": FILTERBANK}
        if not self.freeze:
            facts["masked"] = self.encoder.apply_spec_augment
        method = self._facts.get("model", type(self.encoder.model.encoder).__name__)
        if self.source.startswith(RANDOM_PREFIX):
            return facts | {"method": f"random {method}"}
        told = {"corpus": "corpus", "updates": "step"}
        told |= {name: name for name in ("train_hours", "audio_hours", "device_hours")}
        return facts | {"method": method} | {name: self._facts.get(key) for name, key in told.items()}
