"""Weights of other implementations under this project's names."""

import re

import torch
from torch import Tensor

#: SpeechBrain's names in a Conformer layer, and ours.
_CONFORMER_NAMES = {
    "mha_layer.in_proj_weight": "attention.qkv.weight",
    "mha_layer.out_proj": "attention.out",
    "mha_layer.linear_pos": "attention.position",
    "mha_layer.pos_bias_u": "attention.content_bias",
    "mha_layer.pos_bias_v": "attention.position_bias",
    "convolution_module.layer_norm": "convolution.norm",
    "convolution_module.bottleneck.0": "convolution.gate",
    "convolution_module.conv": "convolution.depthwise",
    "convolution_module.after_conv.0": "convolution.inner_norm",
    "convolution_module.after_conv.2": "convolution.out",
    "ffn_module1.0": "feed_forward1.0",
    "ffn_module1.1.ffn.0": "feed_forward1.1",
    "ffn_module1.1.ffn.3": "feed_forward1.4",
    "ffn_module2.0": "feed_forward2.0",
    "ffn_module2.1.ffn.0": "feed_forward2.1",
    "ffn_module2.1.ffn.3": "feed_forward2.4",
    "norm1.norm": "attention_norm",
    "norm2.norm": "norm",
}


#: SpeechBrain's names before the Conformer, in the module list of its BEST-RQ recipe, and ours.
_FRONT_NAMES = {
    "0.convblock_0.convs.conv_0.conv": "conv1",
    "0.convblock_0.convs.norm_0.norm": "norm1",
    "0.convblock_1.convs.conv_0.conv": "conv2",
    "0.convblock_1.convs.norm_0.norm": "norm2",
    "1.transformer.custom_src_module.layers.0.w": "projection",
}
_CONFORMER_PREFIX = "1.transformer.encoder."
#: Position tables, and what only pre-training needs: the quantizer and the head.
_NOT_CONVERTED = ("1.transformer.positional_encoding", "2.", "3.")


def conformer_from_speechbrain(
    state_dict: dict[str, Tensor], num_heads: int, attention: str = "relative"
) -> dict[str, Tensor]:
    """Rename the weights of SpeechBrain's ``ConformerEncoder`` with ``RelPosMHAXL`` or ``RoPEMHA``.

    With ``RoPEMHA``, queries and keys are reordered too: SpeechBrain rotates the pairs
    (2 i, 2 i + 1) of a head, :class:`speechbrain_bestrq.attention.RotaryAttention` the
    pairs (i, i + d_head / 2), by the same angles. SpeechBrain divides the scores by
    sqrt(d_model), ours by sqrt(d_head): the queries take up the difference.

    Arguments
    ---------
    state_dict : dict
        Of ``speechbrain.lobes.models.transformer.Conformer.ConformerEncoder``.
    num_heads : int
        Its attention heads: SpeechBrain's joint query-key-value weight runs head by head.
    attention : str
        "relative" for ``RelPosMHAXL``, "rotary" for ``RoPEMHA``.

    Returns
    -------
    dict
        For :class:`speechbrain_bestrq.encoder.ConformerEncoder` of the same
        ``attention``, which then gives the same output on unpadded input.

    Raises
    ------
    KeyError
        If the state_dict holds a name that such an encoder does not have.

    Example
    -------
    >>> import torch
    >>> weights = {"norm.norm.weight": torch.ones(8), "layers.0.mha_layer.pos_bias_u": torch.ones(4, 2)}
    >>> {name: tuple(weight.shape) for name, weight in conformer_from_speechbrain(weights, num_heads=2).items()}
    {'norm.weight': (8,), 'layers.0.attention.content_bias': (2, 4)}
    """
    converted = {}
    for name, weight in state_dict.items():
        if name.startswith("norm.norm."):
            converted[name.replace("norm.norm.", "norm.")] = weight
            continue
        match = re.fullmatch(r"(layers\.\d+)\.(.+?)(\.weight|\.bias)?", name)
        inner, suffix = (match[2], match[3] or "") if match else (None, "")
        if inner not in _CONFORMER_NAMES:
            raise KeyError(f"{name} is no weight of SpeechBrain's ConformerEncoder with RelPosMHAXL or RoPEMHA.")
        ours = _CONFORMER_NAMES[inner]
        if ours == "attention.qkv.weight":
            weight = _queries_keys_values(weight, num_heads, attention)
        elif ours.endswith("_bias"):
            weight = weight.reshape(num_heads, -1)  # the memory order is by heads already
        elif ours == "convolution.gate" and suffix == ".weight":
            weight = weight.squeeze(-1)  # a convolution of kernel 1 is a linear layer
        converted[f"{match[1]}.{ours}{suffix}"] = weight
    return converted


def _queries_keys_values(weight: Tensor, num_heads: int, attention: str) -> Tensor:
    """From (heads, [q, k, v], d_head, d_model) to ([q, k, v], heads, d_head, d_model), each flattened to two axes."""
    query, key, value = weight.unflatten(0, (num_heads, 3, -1)).unbind(1)
    if attention == "rotary":
        pairs_apart = torch.arange(query.shape[1]).view(-1, 2).T.flatten()
        query, key = query[:, pairs_apart] * num_heads**-0.5, key[:, pairs_apart]
    return torch.stack((query, key, value)).flatten(0, 2)


def speech_encoder_from_speechbrain(
    state_dict: dict[str, Tensor], num_heads: int, attention: str = "relative"
) -> dict[str, Tensor]:
    """Rename the weights that SpeechBrain's BEST-RQ recipe saves as ``model.ckpt``.

    Arguments
    ---------
    state_dict : dict
        Of the recipe's ``model``: a module list of the ``ConvolutionFrontEnd``, the
        ``EncoderWrapper`` of a ``TransformerASR`` and, in some releases, the quantizer
        and the head, which are left out.
    num_heads, attention
        As for :func:`conformer_from_speechbrain`.

    Returns
    -------
    dict
        For a :class:`speechbrain_bestrq.encoder.SpeechEncoder` with
        :class:`speechbrain_bestrq.speechbrain_frontend.SpeechBrainSubsampling`,
        without what its front end holds.

    Raises
    ------
    KeyError
        If the state_dict holds a name that such a model does not have.

    Example
    -------
    >>> import torch
    >>> weights = {"0.convblock_0.convs.conv_0.conv.bias": torch.ones(8), "3.w.bias": torch.ones(8192)}
    >>> list(speech_encoder_from_speechbrain(weights, num_heads=2))
    ['subsampling.conv1.bias']
    """
    converted, conformer = {}, {}
    for name, weight in state_dict.items():
        module, _, suffix = name.rpartition(".")
        if name.startswith(_CONFORMER_PREFIX):
            conformer[name.removeprefix(_CONFORMER_PREFIX)] = weight
        elif module in _FRONT_NAMES:
            # SpeechBrain's convolutions run over (frequency, time)
            weight = weight.transpose(-1, -2) if weight.ndim == 4 else weight
            converted[f"subsampling.{_FRONT_NAMES[module]}.{suffix}"] = weight
        elif not name.startswith(_NOT_CONVERTED):
            raise KeyError(f"{name} is no weight of SpeechBrain's BEST-RQ recipe.")
    for name, weight in conformer_from_speechbrain(conformer, num_heads, attention).items():
        converted[f"encoder.{name}"] = weight
    return converted
