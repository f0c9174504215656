"""Weights of other implementations under this project's names."""

import re

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


def conformer_from_speechbrain(state_dict: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Rename the weights of SpeechBrain's ``ConformerEncoder`` with ``RelPosMHAXL``.

    Arguments
    ---------
    state_dict : dict
        Of ``speechbrain.lobes.models.transformer.Conformer.ConformerEncoder``.
    num_heads : int
        Its attention heads: SpeechBrain's joint query-key-value weight runs head by head.

    Returns
    -------
    dict
        For :class:`speechbrain_bestrq.encoder.ConformerEncoder` with
        ``attention="relative"``, which then gives the same output on unpadded input.

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
            raise KeyError(f"{name} is no weight of SpeechBrain's ConformerEncoder with RelPosMHAXL.")
        ours = _CONFORMER_NAMES[inner]
        if ours == "attention.qkv.weight":
            # (heads, [q, k, v], d_head, d_model) to ([q, k, v], heads, d_head, d_model)
            weight = weight.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        elif ours.endswith("_bias"):
            weight = weight.reshape(num_heads, -1)  # the memory order is by heads already
        elif ours == "convolution.gate" and suffix == ".weight":
            weight = weight.squeeze(-1)  # a convolution of kernel 1 is a linear layer
        converted[f"{match[1]}.{ours}{suffix}"] = weight
    return converted
