"""A bidirectional LSTM that never asks the device for the lengths."""

import torch
from torch import Tensor, nn

from speechbrain_bestrq.frontend import valid_frames


class BidirectionalLSTM(nn.Module):
    """LSTM layers that read each utterance from both of its own ends.

    Equal to ``nn.LSTM(bidirectional=True)`` on packed sequences. Packing needs the
    lengths on the host, which then waits for the device at every step. Here the second direction
    reads each utterance turned around within its own length, so that padding
    follows it in both directions and nothing of it reaches a frame.

    Recurrent weights start orthogonal, as SpeechBrain's do.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    hidden_size : int
        Cells H of each direction.
    num_layers : int
        Layers; each takes both directions of the one below.
    dropout : float
        On the output of every layer but the last.

    Attributes
    ----------
    output_size : int
        2 H.

    Example
    -------
    >>> lstm = BidirectionalLSTM(8, hidden_size=16, num_layers=2)
    >>> lstm(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0):
        super().__init__()
        self.output_size = 2 * hidden_size
        sizes = [input_size] + [self.output_size] * (num_layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        for layer in (*self.forwards, *self.backwards):
            nn.init.orthogonal_(layer.weight_hh_l0)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Run.

        Arguments
        ---------
        features : Tensor
            Shape (B, T, D).
        lengths : Tensor
            Frames of each utterance, int64, shape (B,), on the device of the features.

        Returns
        -------
        Tensor
            Shape (B, T, 2 H): of each frame the forward direction's output, then the
            backward's; zero in the padding.
        """
        padding = ~valid_frames(lengths, features.shape[1])[..., None]
        rows = _reversed_rows(lengths, features.shape[1])
        x = features.to(self.forwards[0].weight_ih_l0.dtype).masked_fill(padding, 0.0)
        # few processors have an LSTM in half precision, and PyTorch raises on the others; a GPU's is left as it is
        with torch.autocast("cpu", enabled=False):
            for number, (forwards, backwards) in enumerate(zip(self.forwards, self.backwards, strict=True)):
                if number:
                    x = self.dropout(x)
                ahead, _ = forwards(x)
                back, _ = backwards(_take_rows(x, rows))
                x = torch.cat((ahead, _take_rows(back, rows)), dim=-1)
        return x.masked_fill(padding, 0.0)


def _reversed_rows(lengths: Tensor, longest: int) -> Tensor:
    """Number the rows of a flattened batch, each utterance turned around and its padding left in place."""
    frames = torch.arange(longest, device=lengths.device).expand(len(lengths), longest)
    turned = torch.where(frames < lengths[:, None], lengths[:, None] - 1 - frames, frames)
    return (turned + longest * torch.arange(len(lengths), device=lengths.device)[:, None]).flatten()


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, rows).view_as(x)
