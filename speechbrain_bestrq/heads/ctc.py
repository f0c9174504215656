"""Heads of speech recognition: features in, logits of CTC out."""

from torch import Tensor, nn

from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.heads.recurrent import BidirectionalLSTM


class RecurrentCTC(nn.Module):
    """A bidirectional LSTM and a linear layer: the ASR probe of MP3S (arXiv 2308.14456), the paper's Table 1.

    37.8M parameters for D = 512 and 30 units.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    num_labels : int
        Units, the blank among them.
    hidden_size : int
        Cells of each direction.
    num_layers : int
        Layers of the LSTM.
    dropout : float
        Between these.

    Example
    -------
    >>> import torch
    >>> head = RecurrentCTC(input_size=8, num_labels=5, hidden_size=16)
    >>> head(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 5])
    """

    def __init__(
        self, input_size: int, num_labels: int, hidden_size: int = 1024, num_layers: int = 2, dropout: float = 0.2
    ):
        super().__init__()
        self.recurrent = BidirectionalLSTM(input_size, hidden_size, num_layers, dropout)
        self.out = nn.Linear(self.recurrent.output_size, num_labels)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (B, T, D) of so many frames (B,) to logits (B, T, num_labels); the padding's mean nothing."""
        return self.out(self.recurrent(features, lengths))


class FeedForwardCTC(nn.Module):
    """Linear layers, each with LayerNorm and LeakyReLU, dropout between them, and one more: the paper's Table 2.

    Each frame is mapped by itself: the context comes from the encoder, which is fine-tuned. 4.0M parameters for
    D = 512 and 29 units.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    num_labels : int
        Units, the blank among them.
    hidden_size : int
        Channels of the blocks.
    num_layers : int
        Blocks.
    dropout : float
        After each but the last.

    Example
    -------
    >>> import torch
    >>> head = FeedForwardCTC(input_size=8, num_labels=5, hidden_size=16)
    >>> head(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 10, 5])
    """

    def __init__(
        self, input_size: int, num_labels: int, hidden_size: int = 1280, num_layers: int = 3, dropout: float = 0.15
    ):
        super().__init__()
        sizes = [input_size] + [hidden_size] * num_layers
        drops = [dropout] * (num_layers - 1) + [0.0]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(size, hidden_size), nn.LayerNorm(hidden_size), nn.LeakyReLU(), nn.Dropout(drop))
                for size, drop in zip(sizes, drops, strict=False)
            )
        )
        self.out = nn.Linear(sizes[-1], num_labels)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (B, T, D) of so many frames (B,) to logits (B, T, num_labels); the padding's mean nothing."""
        # CTC does not read the padding, but the gradient of a NaN there would be NaN, were it multiplied by zero
        padding = ~valid_frames(lengths, features.shape[1])[..., None]
        return self.out(self.blocks(features.masked_fill(padding, 0.0)))
