"""On a GPU attention is computed by kernels that are right: not by cuDNN's, which PyTorch prefers on an H100."""

import pytest
import torch

from speechbrain_bestrq import attention
from speechbrain_bestrq.attention import RelativeAttention, RotaryAttention, attend
from speechbrain_bestrq.transformer import SelfAttention


@pytest.fixture
def seen(monkeypatch):
    """Whether cuDNN's were allowed in each call of PyTorch's attention."""
    allowed, theirs = [], attention.scaled_dot_product_attention

    def noting(*tensors, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return theirs(*tensors, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noting)
    return allowed


@pytest.mark.parametrize("make", [RotaryAttention, RelativeAttention, SelfAttention])
def test_no_attention_is_computed_by_cudnn(make, seen, absent_gpu):
    layer = make(32, 2, dropout=0.1)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before, "that is PyTorch's own choice"
    with absent_gpu.absent_gpu():
        absent_gpu.move_module(layer)
        layer(torch.randn(2, 7, 32).to("cuda"))
    assert seen == [False] and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_what_one_has_chosen_comes_back_after_an_error(seen, absent_gpu):
    with absent_gpu.absent_gpu():
        query = torch.randn(1, 2, 5, 8).to("cuda")
        with pytest.raises(RuntimeError):
            attend(query, query[..., :4], query)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_compiled_layers_leave_it_out_too(absent_gpu):
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with absent_gpu.absent_gpu():
        query = torch.randn(1, 2, 5, 8).to("cuda")
        torch.compile(attend, backend=keep, fullgraph=True)(query, query, query)
    (graph,) = graphs
    names, allowed, found = {}, None, []
    for node in graph.graph.nodes:
        called = getattr(node.target, "__name__", "")
        if called == "_backend_from_string":
            names[node] = node.args[0]
        elif called == "_sdpa_kernel":
            allowed = [names[one] for one in node.args[0]]
        elif called == "scaled_dot_product_attention":
            found.append(allowed)
    assert found == [["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]]
