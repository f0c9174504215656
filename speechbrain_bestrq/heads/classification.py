"""Heads that name a class of a whole utterance: emotions, intents."""

from torch import Tensor, nn

from speechbrain_bestrq.heads.pooling import mean_pool
from speechbrain_bestrq.heads.recurrent import BidirectionalLSTM


class MeanPoolClassifier(nn.Module):
    """The mean of an utterance's frames and a linear layer: the linear probe of MP3S (arXiv 2308.14456).

    Without bias, as there. Channels that are standardised over the utterance (``utterance_norm`` of
    :class:`~speechbrain_bestrq.downstream.LayerMix`) have a mean of zero: nothing is left of them.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    num_labels : int
        Classes.

    Example
    -------
    >>> import torch
    >>> head = MeanPoolClassifier(input_size=8, num_labels=4)
    >>> head(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 4])
    """

    def __init__(self, input_size: int, num_labels: int):
        super().__init__()
        self.out = nn.Linear(input_size, num_labels, bias=False)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (B, T, D) of so many frames (B,) to logits (B, num_labels)."""
        return self.out(mean_pool(features, lengths))


class RecurrentClassifier(nn.Module):
    """Bidirectional LSTM, linear layer, mean over frames, linear layer: the SLURP probe of MP3S (arXiv 2308.14456).

    The last layer is without bias, as there. 11.0M parameters for D = 512 and 18 classes.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    num_labels : int
        Classes.
    hidden_size : int, optional
        Cells of each direction, and channels of the linear layer; D if left out, as in MP3S.
    num_layers : int
        Layers of the LSTM.
    dropout : float
        Between these.

    Example
    -------
    >>> import torch
    >>> head = RecurrentClassifier(input_size=8, num_labels=18)
    >>> head(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 18])
    """

    def __init__(
        self,
        input_size: int,
        num_labels: int,
        hidden_size: int | None = None,
        num_layers: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        hidden_size = input_size if hidden_size is None else hidden_size
        self.recurrent = BidirectionalLSTM(input_size, hidden_size, num_layers, dropout)
        self.linear = nn.Linear(self.recurrent.output_size, hidden_size)
        self.out = nn.Linear(hidden_size, num_labels, bias=False)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (B, T, D) of so many frames (B,) to logits (B, num_labels)."""
        # the mean of a linear layer's outputs is its output for the mean: once an utterance instead of once a frame
        return self.out(self.linear(mean_pool(self.recurrent(features, lengths), lengths)))
