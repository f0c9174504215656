"""No head reads padding, stumbles over short utterances, or makes the host wait for the device."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_bestrq import heads

DIM, LABELS = 12, 5
MAKERS = {
    "recurrent_ctc": lambda: heads.RecurrentCTC(DIM, num_labels=LABELS, hidden_size=8, dropout=0.0),
    "feed_forward_ctc": lambda: heads.FeedForwardCTC(DIM, num_labels=LABELS, hidden_size=8, dropout=0.0),
    "mean_pool": lambda: heads.MeanPoolClassifier(DIM, num_labels=LABELS),
    "recurrent": lambda: heads.RecurrentClassifier(DIM, num_labels=LABELS),
    "ecapa": lambda: heads.ECAPAEmbedder(DIM, 6, channels=16, pooled_channels=24, attention_channels=4),
    "ecapa_classifier": lambda: heads.ECAPAClassifier(DIM, num_labels=LABELS, channels=16, pooled_channels=24),
    "xvector": lambda: heads.XVectorEmbedder(DIM, 6, channels=16, pooled_channels=24),
}
LENGTHS = [25, 18, 7, 2, 1]


@pytest.fixture(params=MAKERS)
def head(request):
    """Each head, tiny and without dropout, its parameters and statistics away from where they start."""
    torch.manual_seed(0)
    module = MAKERS[request.param]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for buffer in module.buffers():
            buffer.add_(torch.rand(buffer.shape))
    return module


def padded(lengths, longest, junk, seed=1):
    """Utterances of random frames, in a batch with junk as padding."""
    generator = torch.Generator().manual_seed(seed)
    utterances = [torch.randn(length, DIM, generator=generator) for length in lengths]
    batch = torch.full((len(lengths), longest, DIM), junk)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    return utterances, batch, torch.tensor(lengths)


def of_utterances(output, lengths):
    """What counts of a result: a CTC head's padding does not."""
    if output.ndim == 2:
        return output
    return torch.cat([frames[:length] for frames, length in zip(output, lengths, strict=True)])


@pytest.mark.parametrize("junk", [1e4, math.nan])
def test_an_utterance_gives_the_same_alone_and_in_a_padded_batch(head, junk, relative_difference):
    head.eval()
    utterances, batch, lengths = padded(LENGTHS, 30, junk)
    together = head(batch, lengths)
    for number, utterance in enumerate(utterances):
        alone = head(utterance[None], lengths[number : number + 1])[0]
        ours = together[number] if together.ndim == 2 else together[number, : LENGTHS[number]]
        assert relative_difference(alone, ours) < 1e-5


@pytest.mark.parametrize("junk", [1e4, math.nan])
def test_more_padding_changes_nothing_in_training(head, junk, relative_difference):
    trained = []
    for longest, value in ((25, 0.0), (40, junk)):
        module = copy.deepcopy(head).train()
        _, batch, lengths = padded(LENGTHS, longest, value)
        batch.requires_grad_()
        output = of_utterances(module(batch, lengths), LENGTHS)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        frames = torch.cat([row[:length] for row, length in zip(batch.grad, LENGTHS, strict=True)])
        padding = torch.cat([row[length:] for row, length in zip(batch.grad, LENGTHS, strict=True)])
        assert not padding.any()
        gradients = [parameter.grad for parameter in module.parameters()]
        trained.append([output, frames, *gradients, *module.buffers()])
    largest = max(float(gradient.abs().max()) for gradient in trained[0][2:])
    for number, (ours, more) in enumerate(zip(*trained, strict=True)):
        # some gradients are zero but for rounding: a bias before a normalisation
        scale = ours.abs().max() if number < 2 else largest
        assert (ours - more).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("lengths", [[0, 0], [1, 1], [0, 1], [9, 0], [1, 9]])
@pytest.mark.parametrize("training", [True, False])
def test_utterances_of_no_frame_or_one_give_no_nan(head, lengths, training):
    head.train(training)
    _, batch, lengths = padded(lengths, 9, math.nan)
    batch.requires_grad_()
    output = head(batch, lengths)
    output.square().sum().backward()
    assert output.isfinite().all() and batch.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert all(buffer.isfinite().all() for buffer in head.buffers())


def test_an_utterance_of_no_frame_changes_nothing_in_training(head, relative_difference):
    with_empty, without = copy.deepcopy(head).train(), head.train()
    _, batch, lengths = padded([*LENGTHS, 0], 30, math.nan)
    outputs = [
        of_utterances(with_empty(batch, lengths)[:5], LENGTHS),
        of_utterances(without(batch[:5], lengths[:5]), LENGTHS),
    ]
    assert relative_difference(outputs[1], outputs[0]) < 1e-5
    for ours, theirs in zip(with_empty.buffers(), without.buffers(), strict=True):
        assert relative_difference(theirs, ours) < 1e-5


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_results_near_those_of_float32(head, kind, relative_difference):
    _, batch, lengths = padded(LENGTHS, 30, 1e4)
    exact = of_utterances(head.eval()(batch, lengths), LENGTHS)
    with torch.autocast("cpu", kind):
        output = head.eval()(batch, lengths)
        head.train()(batch, lengths).float().square().sum().backward()
    assert relative_difference(exact, of_utterances(output.float(), LENGTHS)) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert all(buffer.dtype == torch.float32 and buffer.isfinite().all() for buffer in head.buffers())


# ---------------------------------------------------------------- stalls


class Waits(TorchDispatchMode):
    """Notes each operation that would make the host wait for a GPU."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_pack_padded_sequence")

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        """Note, and call."""
        self.operations += 1
        name = function.overloadpacket.__name__
        masks = [x for x in torch.utils._pytree.tree_leaves(arguments[1:2]) if getattr(x, "dtype", None) == torch.bool]
        if name in self.names or (name in ("index", "index_put", "index_put_") and masks):
            self.found.append(name)
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_read_back(head, training):
    head.train(training)
    _, batch, lengths = padded(LENGTHS, 30, 0.0)
    with Waits() as waits:
        head(batch, lengths).sum().backward()
    assert waits.operations > 10 and waits.found == []


def test_nothing_of_lengths_and_features_is_needed_on_the_host(head):
    # a meta tensor has no values: reading one, or moving it to the host, raises
    _, batch, lengths = padded(LENGTHS, 30, 0.0)
    output = head.to("meta")(batch.to("meta"), lengths.to("meta"))
    output.sum().backward()
    assert output.is_meta and all(parameter.grad.is_meta for parameter in head.parameters())


def test_the_margin_loss_reads_nothing_back():
    loss = heads.AAMSoftmax(num_labels=LABELS, embedding_size=6)
    with Waits() as waits:
        loss(torch.randn(4, 6), torch.tensor([0, 1, 2, 4]))[0].backward()
    assert waits.operations > 10 and waits.found == []


# ---------------------------------------------------------------- pooling


def test_pools_are_the_statistics_of_each_utterance_alone(relative_difference):
    utterances, batch, lengths = padded([30, 17, 2], 30, math.nan)
    means = torch.stack([utterance.mean(0) for utterance in utterances])
    deviations = torch.stack([utterance.std(0) for utterance in utterances])
    assert relative_difference(means, heads.mean_pool(batch, lengths)) < 1e-6
    assert relative_difference(torch.cat((means, deviations), 1), heads.statistics_pool(batch, lengths)) < 1e-6


def test_pools_compute_in_float32():
    features = torch.full((1, 4000, 2), 60.0, dtype=torch.float16)
    features[:, ::2] += 300.0
    lengths = torch.tensor([4000])
    assert heads.mean_pool(features, lengths).tolist() == [[210.0, 210.0]]
    # the squares sum to more than float16 holds
    assert heads.statistics_pool(features, lengths)[0, 2:].round().tolist() == [150.0, 150.0]
