"""Speaker embeddings are SpeechBrain's where nothing is padded; so is the margin loss, which has no NaN."""

import re

import pytest
import torch
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.Xvector import Xvector
from speechbrain.nnet.CNN import Conv1d
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from speechbrain.nnet.pooling import StatisticsPooling
from torch import nn
from torch.nn.functional import cross_entropy, linear, normalize

from speechbrain_bestrq import heads
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.heads.tdnn import MaskedBatchNorm

#: Parts of SpeechBrain's ECAPA-TDNN, and what they are called here.
ECAPA_NAMES = {
    r"res2net_block\.blocks": "groups",
    r"^blocks\.0": "first",
    r"^blocks\.(\d)": lambda found: f"blocks.{int(found[1]) - 1}",
    "tdnn1": "first",
    "tdnn2": "last",
    r"se_block\.conv1": "excitation.squeeze",
    r"se_block\.conv2": "excitation.excite",
    "^mfa": "aggregation",
    r"^asp\.tdnn\.conv": "pooling.hidden",
    r"^asp\.tdnn\.norm": "pooling.norm",
    r"^asp\.conv": "pooling.score",
    "^asp_bn": "norm",
    "^fc": "out",
}


def ecapa_name(name):
    name = re.sub(r"\.(conv|norm)\.(\w+)$", r".\2", name)
    for pattern, ours in ECAPA_NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def xvector_name(name):
    _, number, *_, last = name.split(".")
    layer, part = divmod(int(number), 3)
    return f"out.{last}" if layer == 5 else f"layers.{layer}.{('conv', 'activation', 'norm')[part]}.{last}"


def make_pair(kind):
    """SpeechBrain's network and ours with the same weights, and what the names of the one are in the other."""
    torch.manual_seed(0)
    if kind == "ecapa":
        theirs = ECAPA_TDNN(12, lin_neurons=6, channels=[16, 16, 16, 16, 24], attention_channels=4)
        ours = heads.ECAPAEmbedder(12, 6, channels=16, pooled_channels=24, attention_channels=4)
        rename = ecapa_name
    else:
        theirs = Xvector(in_channels=12, tdnn_channels=[16, 16, 16, 16, 24], lin_neurons=6)
        ours = heads.XVectorEmbedder(12, 6, channels=16, pooled_channels=24)
        rename = xvector_name
    for module in theirs.modules():
        if isinstance(module, Conv1d):
            module.padding_mode = "constant"
        if isinstance(module, StatisticsPooling):
            module.eps = 0.0  # the scale of its noise
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand(tensor.shape))
    ours.load_state_dict(renamed(theirs.state_dict().items(), rename, ours.state_dict()))
    return theirs, ours, rename


def renamed(tensors, rename, ours):
    """Tensors under our names and in our shapes: a convolution of one frame may be a linear layer here."""
    named = {rename(name): tensor for name, tensor in tensors if not name.endswith("num_batches_tracked")}
    return {name: tensor.reshape(ours[name].shape) for name, tensor in named.items()}


@pytest.mark.parametrize("kind", ["ecapa", "xvector"])
@pytest.mark.parametrize("training", [True, False])
def test_without_padding_they_are_speechbrains_but_for_zeros_at_the_ends(kind, training, relative_difference):
    theirs, ours, rename = make_pair(kind)
    theirs.train(training), ours.train(training)
    features = [torch.randn(4, 30, 12, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = theirs(features[0])[:, 0], ours(features[1], torch.full((4,), 30))
    assert relative_difference(*outputs) < 1e-5
    for output in outputs:
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert relative_difference(features[0].grad, features[1].grad) < 1e-4
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = renamed([(name, parameter.grad) for name, parameter in theirs.named_parameters()], rename, gradients)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert all((gradients[name] - gradient).abs().max() < 1e-4 * largest for name, gradient in expected.items())
    buffers = dict(ours.named_buffers())
    expected = renamed(theirs.named_buffers(), rename, buffers)
    assert set(buffers) == set(expected)
    assert all(relative_difference(statistics, buffers[name]) < 1e-5 for name, statistics in expected.items())


def test_with_padding_the_lengths_matter_in_each_part_of_ecapa(relative_difference):
    _, ours, _ = make_pair("ecapa")
    features = torch.randn(1, 30, 12, generator=torch.Generator().manual_seed(1))
    cut, whole = (ours.eval()(features, torch.tensor([length])) for length in (20, 30))
    assert relative_difference(ours(features[:, :20], torch.tensor([20])), cut) < 1e-5
    assert relative_difference(whole, cut) > 1e-3


def test_the_parameters_of_the_papers_heads():
    with torch.device("meta"):
        theirs = ECAPA_TDNN(512, lin_neurons=512, attention_channels=64)
        ecapa = heads.ECAPAEmbedder(512)
        emotion = heads.ECAPAClassifier(512, num_labels=4)
        xvector = heads.XVectorEmbedder(512)
        speakers = heads.AAMSoftmax(num_labels=1211)
    modules = theirs, ecapa, emotion, xvector, speakers
    counts = [sum(weight.numel() for weight in module.parameters()) for module in modules]
    assert counts[0] == counts[1]
    assert counts[1:] == [7_889_920, 6_611_940, 5_460_884, 620_032]


def test_channels_that_cannot_be_grouped_are_refused():
    with pytest.raises(InputError, match="channels of ECAPA-TDNN must be a multiple of 8, not 20"):
        heads.ECAPAEmbedder(12, channels=20)


# ---------------------------------------------------------------- batch normalisation


def make_norms(channels):
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm(channels), nn.BatchNorm1d(channels)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.add_(torch.rand(tensor.shape))
    theirs.load_state_dict({**ours.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_pytorchs_on_the_valid_frames(training, relative_difference):
    ours, theirs = make_norms(6)
    ours.train(training), theirs.train(training)
    x = 5.0 + torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(20) < torch.tensor([20, 11, 0])[:, None]
    inputs = [x.clone().requires_grad_(), x.transpose(1, 2)[valid].requires_grad_()]
    for _ in range(3):
        outputs = ours(inputs[0], valid[:, None].float()).transpose(1, 2), theirs(inputs[1])
        assert relative_difference(outputs[1], outputs[0][valid]) < 1e-5
        assert not outputs[0][~valid].any()
    weights = torch.linspace(-1, 1, outputs[1].numel()).view_as(outputs[1])
    (outputs[0][valid] * weights).sum().backward()
    (outputs[1] * weights).sum().backward()
    assert relative_difference(inputs[1].grad, inputs[0].grad.transpose(1, 2)[valid]) < 1e-4
    for name in ("weight", "bias"):
        assert relative_difference(getattr(theirs, name).grad, getattr(ours, name).grad) < 1e-5
    for name in ("running_mean", "running_var"):
        assert relative_difference(getattr(theirs, name), getattr(ours, name)) < 1e-6


@pytest.mark.parametrize("frames", [0, 1])
def test_statistics_stay_where_there_is_no_variance(frames):
    norm, _ = make_norms(6)
    before = [tensor.clone() for tensor in norm.buffers()]
    mask = (torch.arange(4) < frames).float()[None, None]
    assert norm(torch.randn(1, 6, 4), mask).isfinite().all()
    assert all(torch.equal(*pair) for pair in zip(before, norm.buffers(), strict=True))


def test_a_frame_by_itself_is_normalised_by_the_running_statistics():
    """By its own it would be the bias, whatever it was, and a head on one utterance would learn nothing."""
    norm, _ = make_norms(6)
    x, mask = torch.randn(1, 6, 1), torch.ones(1, 1, 1)
    assert torch.equal(norm(x, mask), norm.eval()(x, mask))
    assert not torch.equal(norm(2 * x, mask), norm(x, mask))


# ---------------------------------------------------------------- the margin loss


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_the_margin_loss_is_speechbrains(margin, relative_difference):
    torch.manual_seed(0)
    ours = heads.AAMSoftmax(num_labels=7, embedding_size=5, margin=margin)
    theirs = LogSoftmaxWrapper(AdditiveAngularMargin(margin=margin, scale=30))
    embeddings, labels = torch.randn(64, 5), torch.arange(64) % 7
    with torch.no_grad():
        embeddings[0] = -3 * ours.weight[0]  # an angle beyond 180 degrees minus the margin
    loss, logits = ours(embeddings, labels)
    weight = ours.weight.detach().clone().requires_grad_()
    cosines = linear(normalize(embeddings), normalize(weight))
    expected = theirs(cosines[:, None], labels[:, None])
    loss.backward(), expected.backward()
    assert relative_difference(expected, loss) < 1e-5
    assert relative_difference(weight.grad, ours.weight.grad) < 1e-4
    assert relative_difference(30 * cosines, logits) < 1e-6


def test_without_margin_it_is_the_cross_entropy_of_its_logits():
    torch.manual_seed(0)
    loss, logits = heads.AAMSoftmax(num_labels=7, embedding_size=5, margin=0.0)(torch.randn(9, 5), torch.arange(9) % 7)
    assert torch.allclose(loss, cross_entropy(logits, torch.arange(9) % 7), rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_margin_loss_has_a_gradient_at_cosines_of_1_and_minus_1(sign, kind):
    torch.manual_seed(0)
    loss_of = heads.AAMSoftmax(num_labels=3, embedding_size=4)
    with torch.no_grad():
        loss_of.weight.copy_(torch.eye(4)[:3])
    embeddings = (sign * 2.0 * torch.eye(4)[:3]).to(kind).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = loss_of(embeddings, torch.arange(3))
    loss.backward()
    assert loss.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, sign * 30.0 * torch.eye(3))
    assert embeddings.grad.isfinite().all() and loss_of.weight.grad.isfinite().all()


def test_the_margin_loss_never_falls_as_the_angle_grows():
    loss_of = heads.AAMSoftmax(num_labels=2, embedding_size=3)
    with torch.no_grad():
        loss_of.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    losses = []
    for angle in torch.linspace(0, torch.pi, 200):
        loss, _ = loss_of(torch.stack((angle.cos(), angle.sin(), torch.zeros(())))[None], torch.tensor([0]))
        losses.append(float(loss.detach()))
    assert all(after >= before - 1e-5 for before, after in zip(losses[:-1], losses[1:], strict=True))
    assert losses[-1] > 30


def test_embeddings_learn_to_tell_speakers_apart():
    torch.manual_seed(0)
    embedder = heads.ECAPAEmbedder(12, 8, channels=16, pooled_channels=24)
    loss_of = heads.AAMSoftmax(num_labels=4, embedding_size=8)
    optimizer = torch.optim.Adam([*embedder.parameters(), *loss_of.parameters()], lr=5e-3)
    voices, labels, lengths = torch.randn(4, 1, 12), torch.arange(16) % 4, torch.randint(5, 20, (16,))
    for _ in range(40):
        features = voices[labels] + torch.randn(16, 20, 12)
        loss, _ = loss_of(embedder(features, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features = voices[labels] + torch.randn(16, 20, 12)
    _, logits = loss_of(embedder.eval()(features, lengths), labels)
    assert (logits.argmax(1) == labels).float().mean() > 0.8
