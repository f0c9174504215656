"""Speaker embeddings out of features, and the loss that trains them."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, cross_entropy, linear, normalize

from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import valid_frames
from speechbrain_bestrq.heads.pooling import LEAST_VARIANCE, statistics_pool
from speechbrain_bestrq.heads.tdnn import MaskedBatchNorm, TDNNLayer
from speechbrain_bestrq.precision import full_precision

#: Groups of channels in a Res2Net; dilations of ECAPA's blocks (its first layer has 1).
RES2NET_SCALE, DILATIONS = 8, (2, 3, 4)
#: Layers of the x-vector: kernel sizes and dilations.
XVECTOR_LAYERS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))
#: A cosine is kept this far from 1 and -1, where the sine has no gradient.
COSINE_MARGIN = 1e-7


class SqueezeExcitation(nn.Module):
    """Scales each channel by what the utterance's mean says of it (arXiv 1709.01507).

    Arguments
    ---------
    channels : int
        Channels C.
    squeezed : int
        Channels between the two linear layers.

    Example
    -------
    >>> SqueezeExcitation(8, 4)(torch.randn(2, 8, 10), torch.ones(2, 1, 10)).shape
    torch.Size([2, 8, 10])
    """

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Scale (B, C, T), which is zero in the padding, as it stays; ``mask`` (B, 1, T) is 1 for valid frames."""
        mean = x.sum(2, dtype=torch.float32) / mask.sum(2).clamp(min=1)
        return self.excite(self.squeeze(mean).relu()).sigmoid()[:, :, None] * x


class SERes2NetBlock(nn.Module):
    """ECAPA-TDNN's block: a layer, a dilated Res2Net (arXiv 1904.01169), a layer, squeeze-excitation, and a shortcut.

    Arguments
    ---------
    channels : int
        Channels C, a multiple of 8.
    dilation : int
        Of the Res2Net's convolutions of 3 frames.
    squeezed : int
        See :class:`SqueezeExcitation`.

    Example
    -------
    >>> SERes2NetBlock(16, dilation=2)(torch.randn(2, 16, 10), torch.ones(2, 1, 10)).shape
    torch.Size([2, 16, 10])
    """

    def __init__(self, channels: int, dilation: int, squeezed: int = 128):
        super().__init__()
        group = channels // RES2NET_SCALE
        self.first = TDNNLayer(channels, channels)
        self.groups = nn.ModuleList(
            TDNNLayer(group, group, kernel_size=3, dilation=dilation) for _ in range(RES2NET_SCALE - 1)
        )
        self.last = TDNNLayer(channels, channels)
        self.excitation = SqueezeExcitation(channels, squeezed)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, C, T), which is zero in the padding, as it stays; ``mask`` (B, 1, T) is 1 for valid frames."""
        untouched, *parts = self.first(x, mask).chunk(RES2NET_SCALE, dim=1)
        done = [untouched]
        for layer, part in zip(self.groups, parts, strict=True):
            done.append(layer(part if len(done) == 1 else part + done[-1], mask))
        return x + self.excitation(self.last(torch.cat(done, dim=1), mask), mask)


class AttentiveStatistics(nn.Module):
    """Mean and deviation of each channel, weighted by an attention over frames of its own (arXiv 2005.07143, eq. 4-6).

    The attention sees the frame, and mean and deviation of the utterance.

    Arguments
    ---------
    channels : int
        Channels C.
    attention_channels : int
        Channels inside the attention.

    Example
    -------
    >>> AttentiveStatistics(8, 4)(torch.randn(2, 8, 10), torch.ones(2, 1, 10)).shape
    torch.Size([2, 16])
    """

    def __init__(self, channels: int, attention_channels: int):
        super().__init__()
        self.hidden = nn.Conv1d(3 * channels, attention_channels, 1)
        self.norm = MaskedBatchNorm(attention_channels)
        self.score = nn.Conv1d(attention_channels, channels, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Pool (B, C, T), zero in the padding, to float32 (B, 2 C); ``mask`` (B, 1, T) is 1 for valid frames."""
        context = _weighted_statistics(x, mask / mask.sum(2, keepdim=True).clamp(min=1))
        # the context is the same for all frames: its part of the convolution is computed once an utterance
        channels = x.shape[1]
        of_frame, of_context = self.hidden.weight.split((channels, 2 * channels), dim=1)
        hidden = conv1d(x, of_frame, self.hidden.bias) + linear(context, of_context[..., 0])[..., None]
        scores = self.score(self.norm(hidden.relu(), mask).tanh()).float()
        # no infinity: where no frame is valid, its softmax would be NaN
        weights = scores.masked_fill(mask == 0, torch.finfo(torch.float32).min).softmax(2)
        return _weighted_statistics(x, weights)


def _weighted_statistics(x: Tensor, weights: Tensor) -> Tensor:
    """Mean and deviation over frames of (B, C, T), float32 (B, 2 C); the weights sum to 1 over valid frames."""
    x = x.float()
    mean = (weights * x).sum(2)
    variance = (weights * (x - mean[..., None]).square()).sum(2)
    return torch.cat((mean, variance.clamp(min=LEAST_VARIANCE).sqrt()), dim=1)


class ECAPAEmbedder(nn.Module):
    """ECAPA-TDNN (arXiv 2005.07143) for padded batches; the sizes are those of the MP3S probe (arXiv 2308.14456).

    SpeechBrain's ``ECAPA_TDNN`` reads padding in its convolutions and counts it in the
    statistics of its batch normalisation; so an utterance's embedding changes with its neighbours'
    lengths. Here no padding is read. SpeechBrain mirrors the frames at an utterance's
    ends, here zeros stand there, which also lets utterances be shorter than a kernel. Else the two are equal.
    7.9M parameters for D = 512.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    embedding_size : int
        Channels E of the embedding: 512 for speakers, 96 for emotions in MP3S.
    channels : int
        Of the layers; a multiple of 8.
    pooled_channels : int
        Of the last layer, which sees the outputs of all blocks, and whose statistics are pooled.
    attention_channels : int
        Inside the pooling's attention.

    Attributes
    ----------
    embedding_size : int
        E.

    Raises
    ------
    InputError
        If the channels are no multiple of 8.

    Example
    -------
    >>> embedder = ECAPAEmbedder(input_size=8, embedding_size=4, channels=16, pooled_channels=24)
    >>> embedder(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        input_size: int,
        embedding_size: int = 512,
        channels: int = 512,
        pooled_channels: int = 1536,
        attention_channels: int = 64,
    ):
        super().__init__()
        if channels % RES2NET_SCALE:
            raise InputError(f"channels of ECAPA-TDNN must be a multiple of {RES2NET_SCALE}, not {channels}.")
        self.embedding_size = embedding_size
        self.first = TDNNLayer(input_size, channels, kernel_size=5)
        self.blocks = nn.ModuleList(SERes2NetBlock(channels, dilation) for dilation in DILATIONS)
        self.aggregation = TDNNLayer(len(DILATIONS) * channels, pooled_channels)
        self.pooling = AttentiveStatistics(pooled_channels, attention_channels)
        self.norm = MaskedBatchNorm(2 * pooled_channels)
        self.out = nn.Linear(2 * pooled_channels, embedding_size)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Embed utterances.

        Arguments
        ---------
        features : Tensor
            Shape (B, T, D).
        lengths : Tensor
            Frames of each utterance, int64, shape (B,), on the device of the features.

        Returns
        -------
        Tensor
            Shape (B, E). An utterance without frames counts in no statistics; its embedding means nothing.
        """
        valid = valid_frames(lengths, features.shape[1])[:, None]
        mask = valid.float()
        x = self.first(features.transpose(1, 2).masked_fill(~valid, 0.0), mask)
        states = []
        for block in self.blocks:
            x = block(x, mask)
            states.append(x)
        pooled = self.pooling(self.aggregation(torch.cat(states, dim=1), mask), mask)
        spoken = (lengths > 0).float()[:, None, None]
        return self.out(self.norm(pooled[..., None], spoken)[..., 0])


class ECAPAClassifier(nn.Module):
    """ECAPA-TDNN and a linear layer: the emotion probe of MP3S (arXiv 2308.14456).

    There, the logits are cosines without a scale: of four classes, none can get more than
    71 % of the softmax. Here they are those of a linear layer. 6.6M parameters for D = 512 and 4 classes.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    num_labels : int
        Classes.
    embedding_size, channels, pooled_channels, attention_channels : int
        See :class:`ECAPAEmbedder`.

    Example
    -------
    >>> head = ECAPAClassifier(input_size=8, num_labels=4, channels=16, pooled_channels=24)
    >>> head(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        input_size: int,
        num_labels: int,
        embedding_size: int = 96,
        channels: int = 512,
        pooled_channels: int = 1536,
        attention_channels: int = 64,
    ):
        super().__init__()
        self.embedder = ECAPAEmbedder(input_size, embedding_size, channels, pooled_channels, attention_channels)
        self.out = nn.Linear(embedding_size, num_labels)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (B, T, D) of so many frames (B,) to logits (B, num_labels)."""
        return self.out(self.embedder(features, lengths))


class XVectorEmbedder(nn.Module):
    """The x-vector network (Snyder et al., 2018) for padded batches; the sizes are SpeechBrain's and MP3S's.

    SpeechBrain's ``Xvector`` pools utterance by utterance, adds random noise to the means, in
    evaluation too, and reads padding in its convolutions and its batch normalisation. Here there is no noise and no
    padding is read; beyond an utterance's ends stand zeros instead of mirrored frames. Else the two are equal.
    5.5M parameters for D = 512.

    Arguments
    ---------
    input_size : int
        Channels D of the features.
    embedding_size : int
        Channels E of the embedding.
    channels : int
        Of the layers.
    pooled_channels : int
        Of the last one, whose statistics are pooled.

    Attributes
    ----------
    embedding_size : int
        E.

    Example
    -------
    >>> embedder = XVectorEmbedder(input_size=8, embedding_size=4, channels=16, pooled_channels=24)
    >>> embedder(torch.randn(2, 10, 8), torch.tensor([10, 7])).shape
    torch.Size([2, 4])
    """

    def __init__(self, input_size: int, embedding_size: int = 512, channels: int = 512, pooled_channels: int = 1500):
        super().__init__()
        self.embedding_size = embedding_size
        sizes = [input_size] + [channels] * (len(XVECTOR_LAYERS) - 1) + [pooled_channels]
        self.layers = nn.ModuleList(
            TDNNLayer(before, after, kernel_size, dilation, nn.LeakyReLU())
            for before, after, (kernel_size, dilation) in zip(sizes[:-1], sizes[1:], XVECTOR_LAYERS, strict=True)
        )
        self.out = nn.Linear(2 * pooled_channels, embedding_size)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (B, T, D) of so many frames (B,) to embeddings (B, E)."""
        valid = valid_frames(lengths, features.shape[1])[:, None]
        mask = valid.float()
        x = features.transpose(1, 2).masked_fill(~valid, 0.0)
        for layer in self.layers:
            x = layer(x, mask)
        return self.out(statistics_pool(x.transpose(1, 2), lengths))


class AAMSoftmax(nn.Module):
    """Additive angular margin softmax (ArcFace, arXiv 1801.07698): a classifier of embeddings, and its loss.

    The logits are scaled cosines between the embedding and a vector of each label. For the loss, the
    margin is added to the angle to the right one; where that would pass 180 degrees,
    the cosine is lowered by margin times sine of the margin instead, so that it never rises again.

    Arguments
    ---------
    num_labels : int
        Classes: speakers.
    embedding_size : int
        Channels E of the embeddings.
    margin : float
        Angle, radians.
    scale : float
        Of the cosines.

    Example
    -------
    >>> loss, logits = AAMSoftmax(num_labels=5, embedding_size=8)(torch.randn(2, 8), torch.tensor([0, 4]))
    >>> loss.shape, logits.shape
    (torch.Size([]), torch.Size([2, 5]))
    """

    def __init__(self, num_labels: int, embedding_size: int = 512, margin: float = 0.2, scale: float = 30.0):
        super().__init__()
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(torch.empty(num_labels, embedding_size))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Arguments
        ---------
        embeddings : Tensor
            Shape (B, E).
        labels : Tensor
            The right classes, int64, shape (B,).

        Returns
        -------
        loss : Tensor
            Mean cross-entropy over the batch, with the margin; float32, shape ().
        logits : Tensor
            Scaled cosines, without the margin; float32, shape (B, num_labels).
        """
        with full_precision(embeddings.device.type):  # near 1, bf16 cannot tell one cosine from the next
            cosines = linear(normalize(embeddings.float()), normalize(self.weight.float()))
            right = cosines.gather(1, labels[:, None]).clamp(-1 + COSINE_MARGIN, 1 - COSINE_MARGIN)
            beyond = right * math.cos(self.margin) - (1 - right.square()).sqrt() * math.sin(self.margin)
            lowered = right - self.margin * math.sin(self.margin)
            with_margin = torch.where(right > -math.cos(self.margin), beyond, lowered)
            logits = self.scale * cosines
            return cross_entropy(logits.scatter(1, labels[:, None], self.scale * with_margin), labels), logits
