"""The bidirectional LSTM is PyTorch's on packed sequences; the heads around it are what they say."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from speechbrain_bestrq import heads

LENGTHS = [9, 4, 1, 12]


def packed_lstm(ours, input_size, hidden_size, num_layers, dropout=0.0):
    """PyTorch's LSTM with the same weights, the names of ours beside those of its parameters."""
    theirs = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, bidirectional=True, dropout=dropout)
    names = {}
    for direction, suffix in (("forwards", ""), ("backwards", "_reverse")):
        for layer in range(num_layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                names[f"{direction}.{layer}.{name}_l0"] = f"{name}_l{layer}{suffix}"
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    return theirs, names


def run_packed(lstm, features, lengths):
    packed = pack_padded_sequence(features, lengths, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=features.shape[1])[0]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_it_is_the_lstm_of_packed_sequences(num_layers, relative_difference):
    torch.manual_seed(0)
    ours = heads.BidirectionalLSTM(6, hidden_size=5, num_layers=num_layers)
    theirs, names = packed_lstm(ours, 6, 5, num_layers)
    lengths, features = torch.tensor(LENGTHS), torch.randn(4, 12, 6)
    assert ours.output_size == 10 and ours(features, lengths).shape == (4, 12, 10)
    assert relative_difference(run_packed(theirs, features, lengths), ours(features, lengths)) < 1e-6
    # in float64 the gradients of sums, too, are free of rounding
    ours.double(), theirs.double()
    inputs = [features.double().requires_grad_() for _ in range(2)]
    outputs = ours(inputs[0], lengths), run_packed(theirs, inputs[1], lengths)
    assert relative_difference(outputs[1], outputs[0]) < 1e-12
    for output in outputs:
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert relative_difference(inputs[1].grad, inputs[0].grad) < 1e-12
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_difference(expected[names[name]].grad, parameter.grad) < 1e-12, name


def test_dropout_is_between_the_layers_and_in_training_only(relative_difference):
    torch.manual_seed(0)
    ours = heads.BidirectionalLSTM(6, hidden_size=5, num_layers=3, dropout=1.0)
    theirs, _ = packed_lstm(ours, 6, 5, 3, dropout=1.0)
    features, lengths = torch.randn(4, 12, 6), torch.tensor(LENGTHS)
    dropped = ours(features, lengths)
    assert relative_difference(run_packed(theirs, features, lengths), dropped) < 1e-6
    # nothing of the features passes, and yet something comes out: the last layer's output is not dropped
    assert torch.equal(dropped, ours(2 * features, lengths)) and dropped.any()
    # what the first layer takes is not dropped either
    single = heads.BidirectionalLSTM(6, hidden_size=5, num_layers=1, dropout=1.0)
    assert torch.equal(single(features, lengths), single.eval()(features, lengths))
    assert relative_difference(run_packed(theirs.eval(), features, lengths), ours.eval()(features, lengths)) < 1e-6


def test_recurrent_weights_start_orthogonal():
    lstm = heads.BidirectionalLSTM(6, hidden_size=5, num_layers=2)
    weights = [layer.weight_hh_l0 for layer in (*lstm.forwards, *lstm.backwards)]
    assert len(weights) == 4
    assert all(torch.allclose(weight.T @ weight, torch.eye(5), atol=1e-5) for weight in weights)


def test_the_parameters_of_the_papers_heads():
    with torch.device("meta"):
        probe = heads.RecurrentCTC(input_size=512, num_labels=30)
        fine_tuned = heads.FeedForwardCTC(input_size=512, num_labels=29)
        intents = heads.RecurrentClassifier(input_size=512, num_labels=18)
        linear = heads.MeanPoolClassifier(input_size=512, num_labels=18)
    counts = [sum(weight.numel() for weight in head.parameters()) for head in (probe, fine_tuned, intents, linear)]
    assert counts == [37_842_974, 3_980_829, 11_036_160, 9_216]


def test_the_feed_forward_head_maps_each_frame_by_itself_as_its_blocks_say(relative_difference):
    torch.manual_seed(0)
    head = heads.FeedForwardCTC(6, num_labels=4, hidden_size=5, num_layers=2, dropout=0.3).eval()
    features = torch.randn(1, 8, 6)
    x = features
    for linear, norm, _, _ in head.blocks:
        x = nn.functional.leaky_relu(nn.functional.layer_norm(linear(x), (5,), norm.weight, norm.bias), 0.01)
    assert [dropout.p for *_, dropout in head.blocks] == [0.3, 0.0]
    assert relative_difference(head.out(x), head(features, torch.tensor([8]))) < 1e-6


def test_the_intent_head_pools_after_its_linear_layer_or_before_alike(relative_difference):
    torch.manual_seed(0)
    head = heads.RecurrentClassifier(6, num_labels=4, hidden_size=5)
    features, lengths = torch.randn(4, 12, 6), torch.tensor(LENGTHS)
    frames = head.linear(head.recurrent(features, lengths))
    expected = head.out(torch.stack([row[:length].mean(0) for row, length in zip(frames, LENGTHS, strict=True)]))
    assert relative_difference(expected, head(features, lengths)) < 1e-5
    assert head.out.bias is None


def test_the_mean_pool_head_is_a_linear_layer_on_means(relative_difference):
    torch.manual_seed(0)
    head = heads.MeanPoolClassifier(6, num_labels=4)
    features = torch.randn(4, 12, 6)
    means = torch.stack([row[:length].mean(0) for row, length in zip(features, LENGTHS, strict=True)])
    assert relative_difference(means @ head.out.weight.T, head(features, torch.tensor(LENGTHS))) < 1e-5


def test_a_ctc_head_learns_where_the_padding_is_nan():
    torch.manual_seed(0)
    labels, lengths = torch.tensor([[1, 2, 3], [3, 1, 1]]), torch.tensor([12, 9])
    label_lengths = torch.tensor([3, 2])
    features = torch.randn(2, 12, 6)
    features[1, 9:] = torch.nan
    # without dropout, by whose luck the last loss would be judged
    for head in (heads.RecurrentCTC(6, 4, 16, dropout=0.0), heads.FeedForwardCTC(6, 4, 32, dropout=0.0)):
        optimizer, losses = torch.optim.Adam(head.parameters(), lr=0.01), []
        for _ in range(60):
            log_probs = head(features, lengths).float().log_softmax(-1).transpose(0, 1)
            loss = nn.functional.ctc_loss(log_probs, labels, lengths, label_lengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.2 * losses[0]
