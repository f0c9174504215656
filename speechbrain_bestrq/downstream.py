"""What downstream tasks share: the learned mix of an encoder's hidden states."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from speechbrain.utils.distributed import if_main_process
from torch import Tensor, nn

from speechbrain_bestrq.frontend import absolute_lengths, normalize_utterances
from speechbrain_bestrq.precision import full_precision
from speechbrain_bestrq.pretrained import PretrainedEncoder
from speechbrain_bestrq.writing import replacing, write_text


class LayerMix(nn.Module):
    """A learned mix of hidden states: their sum, weighted by a softmax.

    As in ELMo (arXiv 1802.05365) and SUPERB (arXiv 2105.01051). The logits start at
    zero: all states count alike at first.

    Arguments
    ---------
    num_layers : int
        Hidden states to mix: the encoder's layers, and one for the input of the first.
    layernorm : bool
        Normalise each state's frames (LayerNorm without parameters) before the sum, so
        that a weight says what it seems to, whatever the states' scales.
    utterance_norm : bool
        Normalise each state's channels over the utterance's frames before the sum. That
        equalises the scales too, and takes away what all frames of an utterance have in
        common: the speaker, the microphone, the room. For tasks of what is said.

    Attributes
    ----------
    weights : Parameter
        The logits, shape (num_layers,).

    Raises
    ------
    ValueError
        If both are wanted.

    Example
    -------
    >>> mix = LayerMix(3)
    >>> mix(torch.randn(3, 4, 25, 16)).shape
    torch.Size([4, 25, 16])
    >>> mix.describe()
    'layer weights, lowest first: 0.333 0.333 0.333'
    """

    def __init__(self, num_layers: int, layernorm: bool = False, utterance_norm: bool = False):
        if layernorm and utterance_norm:
            raise ValueError("layernorm and utterance_norm exclude each other: choose one.")
        super().__init__()
        self.num_layers, self.layernorm, self.utterance_norm = num_layers, layernorm, utterance_norm
        self.weights = nn.Parameter(torch.zeros(num_layers))

    def forward(self, hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mix.

        Arguments
        ---------
        hidden : Tensor
            Shape (num_layers, B, T, D).
        lengths : Tensor, optional
            Frames of each utterance, shape (B,); None when nothing is padded. They matter
            with ``utterance_norm``.

        Returns
        -------
        Tensor
            float32, shape (B, T, D); zero where all states are (in the padding).

        Raises
        ------
        ValueError
            If there is another number of states.
        """
        if len(hidden) != self.num_layers:
            raise ValueError(f"the mix is of {self.num_layers} hidden states, not of {len(hidden)}.")
        with full_precision(hidden.device.type):  # a matrix product would round the weights, to bf16 or to TF32
            hidden = hidden.float()
            if self.layernorm:
                hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:])
            if self.utterance_norm:
                hidden = normalize_utterances(hidden, lengths, each_channel=True)
            return torch.tensordot(self.weights.softmax(0), hidden, dims=1)

    def shares(self) -> list[float]:
        """Give each state's weight in the sum; makes the host wait for a GPU, so once an epoch.

        Returns
        -------
        list of float
            Sums to 1; the input of the first layer comes first.
        """
        return self.weights.detach().softmax(0).tolist()

    def describe(self) -> str:
        """Say the weights in one line, for a log.

        Returns
        -------
        str
        """
        return "layer weights, lowest first: " + " ".join(f"{share:.3f}" for share in self.shares())


class WeightedEncoder(nn.Module):
    """A pre-trained encoder and a :class:`LayerMix`, in the place of SpeechBrain's ``WeightedSSLModel``.

    Arguments
    ---------
    hub : str or Path
        The encoder's source; the name is that of ``WeightedSSLModel``.
    save_path, freeze, freeze_feature_extractor, apply_spec_augment, freeze_layers, output_rate, layer_drop
        See :class:`speechbrain_bestrq.pretrained.PretrainedEncoder`.
    layernorm, utterance_norm : bool
        See :class:`LayerMix`.

    Attributes
    ----------
    encoder : PretrainedEncoder
    mix : LayerMix
    weights : Parameter
        The mix's logits, shape (num_layers,). They are trained also when the encoder is frozen.
    num_layers : int
        Hidden states: the encoder's layers and one.
    output_dim : int
        Channels D of the result.

    Example
    -------
    >>> from speechbrain_bestrq.artefact import save_encoder
    >>> from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
    >>> from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
    >>> folder = save_encoder(
    ...     SpeechEncoder(
    ...         LogMel(normalize="utterance"),
    ...         ConvSubsampling(d_model=16),
    ...         ConformerEncoder(16, num_layers=2, num_heads=2, d_ffn=32),
    ...     ),
    ...     getfixture("tmp_path") / "encoder",
    ...     "# A small encoder",
    ... )
    >>> encoder = WeightedEncoder(folder, freeze=True)
    >>> encoder(torch.randn(4, 16000)).shape, encoder.num_layers
    (torch.Size([4, 25, 16]), 3)
    """

    def __init__(
        self,
        hub: str | os.PathLike,
        save_path: str | os.PathLike | None = None,
        layernorm: bool = False,
        freeze: bool = False,
        freeze_feature_extractor: bool = False,
        apply_spec_augment: bool = False,
        freeze_layers: int = 0,
        output_rate: int | None = None,
        utterance_norm: bool = False,
        layer_drop: float | None = None,
    ):
        super().__init__()
        self.encoder = PretrainedEncoder(
            hub,
            save_path,
            freeze=freeze,
            freeze_feature_extractor=freeze_feature_extractor,
            apply_spec_augment=apply_spec_augment,
            output_all_hiddens=True,
            freeze_layers=freeze_layers,
            output_rate=output_rate,
            layer_drop=layer_drop,
        )
        self.mix = LayerMix(self.encoder.num_layers + 1, layernorm, utterance_norm)
        self.num_layers, self.output_dim = self.mix.num_layers, self.encoder.output_dim
        self.freeze = freeze

    @property
    def weights(self) -> nn.Parameter:
        """The mix's logits."""
        return self.mix.weights

    @property
    def model(self) -> nn.Module:
        """The encoder's, whose ``feature_extractor`` recipes freeze by themselves."""
        return self.encoder.model

    def forward(self, wav: Tensor, wav_lens: Tensor | None = None) -> Tensor:
        """Encode waveforms (B, N) of relative lengths (B,) into (B, T, D); zero in the padding."""
        lengths = None
        if self.mix.utterance_norm and wav_lens is not None:
            lengths = self.encoder.num_frames(absolute_lengths(wav_lens.to(wav.device), wav.shape[-1]))
        return self.mix(self.encoder(wav, wav_lens), lengths)


def record_layer_weights(mix: LayerMix, epoch: int, folder: str | os.PathLike) -> str:
    """Keep the weights of a :class:`LayerMix` after an epoch, and draw those of all epochs so far.

    For a Brain's ``on_stage_end``, on all ranks; the main one writes ``layer_weights.json``
    and ``layer_weights.png``. A resumed run goes on with the epochs that it finds there.

    Arguments
    ---------
    mix : LayerMix
        The mix.
    epoch : int
        Counted from 1.
    folder : str or Path
        Of the run.

    Returns
    -------
    str
        The weights in one line, for a log.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> record_layer_weights(LayerMix(2), 1, folder)
    'layer weights, lowest first: 0.500 0.500'
    >>> sorted(path.name for path in folder.iterdir())
    ['layer_weights.json', 'layer_weights.png']
    """
    if if_main_process():
        path = Path(folder) / "layer_weights.json"
        history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        unknown = [None] * (epoch - 1 - len(history))
        history = [*history[: epoch - 1], *unknown, mix.shares()]
        nothing = [float("nan")] * mix.num_layers
        draw_layer_weights([shares or nothing for shares in history], path.with_suffix(".png"))
        write_text(path, json.dumps(history))
    return mix.describe()


def draw_layer_weights(history: Sequence[Sequence[float]], path: str | os.PathLike) -> Path:
    """Draw how the weights of a :class:`LayerMix` went, and where they came to.

    Arguments
    ---------
    history : sequence of sequence of float
        The shares after each epoch, as :meth:`LayerMix.shares` gives them.
    path : str or Path
        The PNG.

    Returns
    -------
    Path
        The PNG.

    Raises
    ------
    ValueError
        If the history is empty.

    Example
    -------
    >>> path = draw_layer_weights([[0.5, 0.5], [0.4, 0.6]], getfixture("tmp_path") / "layers.png")
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    if not history:
        raise ValueError("no weights to draw: the history is empty.")
    states = range(len(history[-1]))
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    last, course = figure.subplots(1, 2)
    last.bar(states, history[-1], color="tab:blue")
    last.axhline(1 / len(states), color="gray", linestyle="--", linewidth=1, label="all alike")
    last.set(title=f"after epoch {len(history)}", xlabel="hidden state (0: input of the first layer)", ylabel="weight")
    last.set_ylim(bottom=0)
    last.legend()
    for state in states:
        course.plot(range(1, len(history) + 1), [shares[state] for shares in history], marker=".", label=f"{state}")
    course.set(title="over the epochs", xlabel="epoch", ylabel="weight")
    course.set_ylim(bottom=0)
    course.legend(title="state", ncols=2, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    return Path(path)
