"""Augmentation of waveforms that SpeechBrain has only in a form that waits for the device at each utterance."""

import torch
from torch import Tensor, nn


class DropChunks(nn.Module):
    """Silences some chunks of each utterance, as SpeechBrain's ``DropChunk`` does without noise.

    A chunk may begin wherever it ends within the utterance; there, wherever the longest of the utterance does.
    Draws come from PyTorch's global generator, where the waveforms are; nothing is read back.

    Arguments
    ---------
    min_count, max_count : int
        Chunks of an utterance; they may overlap.
    min_length, max_length : int
        Samples of a chunk.

    Example
    -------
    >>> drop = DropChunks(min_count=2, max_count=2, min_length=10, max_length=10)
    >>> dropped = drop(torch.ones(3, 1000), torch.tensor([1.0, 1.0, 0.5]))
    >>> bool(((dropped == 0).sum(1) >= 10).all()), bool((dropped[2, 500:] == 1).all())
    (True, True)
    """

    def __init__(self, min_count: int = 0, max_count: int = 5, min_length: int = 1000, max_length: int = 2000):
        super().__init__()
        if not (0 <= min_count <= max_count and 0 < min_length <= max_length):
            raise ValueError(
                f"chunks: the least must not be more than the most: counts {min_count} to {max_count}, "
                f"lengths {min_length} to {max_length}."
            )
        self.min_count, self.max_count, self.min_length, self.max_length = min_count, max_count, min_length, max_length

    def forward(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """Silence chunks.

        Arguments
        ---------
        wavs : Tensor
            Waveforms, shape (B, N).
        wav_lens : Tensor
            Their lengths relative to the longest, shape (B,).

        Returns
        -------
        Tensor
            Shape (B, N).
        """
        batch, samples = wavs.shape

        def draw(low: int, high: int, *size: int) -> Tensor:
            return low + (torch.rand(*size, device=wavs.device) * (high - low + 1)).long().clamp(max=high - low)

        counts = draw(self.min_count, self.max_count, batch, 1)
        lengths = draw(self.min_length, self.max_length, batch, self.max_count)
        room = ((wav_lens[:, None] * samples).long() - lengths).clamp(min=0)
        starts = (torch.rand(batch, self.max_count, device=wavs.device) * (room + 1)).long()
        lengths = torch.where(torch.arange(self.max_count, device=wavs.device) < counts, lengths, 0)
        place = torch.arange(samples, device=wavs.device)
        hidden = (place >= starts[..., None]) & (place < (starts + lengths)[..., None])
        return wavs.masked_fill(hidden.any(1), 0.0)
