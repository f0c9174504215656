"""Properties of wav2vec 2.0's quantizer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer, mean_shares, perplexity


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        """Call, and look at the results."""
        result = function(*arguments, **(named or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_straight_through_gradient_is_that_of_the_product_with_one_hot_vectors():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(8, code_dim=12, codebook_size=5, num_groups=3)
    quantizer.start_update(50_000)
    frames, gumbel, weights = torch.randn(20, 8), quantizer.draw_noise(20), torch.randn(20, 12)
    found = quantizer(frames, gumbel)
    ours = torch.autograd.grad((found.vectors * weights).sum(), list(quantizer.parameters()))

    scores = quantizer.projection(frames).view(20, 3, 5) + gumbel
    soft = (scores / quantizer.temperature).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), 5) + soft - soft.detach()
    vectors = torch.einsum("kgv,gvd->kgd", hard, quantizer.codebooks).flatten(1)
    theirs = torch.autograd.grad((vectors * weights).sum(), list(quantizer.parameters()))
    torch.testing.assert_close(found.vectors, vectors)
    assert len(found.codes.unique()) == 5
    for ours_of_one, theirs_of_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_of_one, theirs_of_one)


@pytest.mark.parametrize("training", [True, False])
def test_no_product_of_frames_codes_and_dimensions_is_built(training):
    quantizer = GumbelQuantizer(8, code_dim=64, codebook_size=20).train(training)
    with Largest() as seen:
        quantizer(torch.randn(30, 8)).vectors.square().sum().backward()
    assert 30 * 2 * 20 <= seen.elements < 30 * 2 * 20 * 32


@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_no_code(training):
    quantizer = GumbelQuantizer(512).train(training)
    frames = torch.nn.functional.layer_norm(torch.randn(1500, 512), (512,))
    gumbel = quantizer.draw_noise(len(frames))
    codes = quantizer(frames, gumbel).codes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(frames, gumbel).codes, codes)
        # a product in bf16 would
        rough = quantizer.projection(frames).unflatten(-1, (2, 320)).argmax(-1)
    exact = quantizer.projection(frames).unflatten(-1, (2, 320)).argmax(-1)
    assert (rough != exact).double().mean() > 0.002


def test_without_training_the_likeliest_code_is_taken_without_noise():
    quantizer = GumbelQuantizer(8, code_dim=4, codebook_size=5).eval()
    frames = torch.randn(40, 8)
    quantized = quantizer(frames)
    assert torch.equal(quantized.codes, quantized.probabilities.argmax(-1))
    assert torch.equal(quantizer(frames).vectors, quantized.vectors)
    first = quantizer.codebooks[0, quantized.codes[:, 0]]
    assert torch.equal(quantized.vectors[:, :2], first)


def test_the_temperature_is_a_function_of_the_update():
    quantizer = GumbelQuantizer(8, code_dim=4, codebook_size=5)
    found = []
    for update in (1, 2, 200_000, 277_000, 278_000, 400_000):
        quantizer.start_update(update)
        found.append(quantizer.temperature)
    assert found[:3] == [2.0, 2.0 * 0.999995, 2.0 * 0.999995**199_999]
    assert found[3] > 0.5 and found[4] == found[5] == 0.5


def test_perplexity_lies_between_groups_and_codes_and_has_a_gradient_at_zero():
    shares = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], requires_grad=True)
    value = perplexity(shares)
    value.backward()
    assert value.item() == pytest.approx(4.0)
    assert shares.grad.isfinite().all()


def test_gumbel_noise_has_the_mean_and_the_deviation_of_its_distribution():
    noise = GumbelQuantizer(8, code_dim=4, codebook_size=5).draw_noise(20_000, torch.Generator().manual_seed(0))
    assert noise.shape == (20_000, 2, 5)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.std()) == pytest.approx(1.2825, abs=0.02)


def test_mean_shares_are_in_float32_under_autocast():
    """In half precision the diversity would be rounded, and more frames than it counts to would overflow."""
    probabilities = torch.randn(70_000, 1, 4).softmax(-1)
    real = torch.ones(70_000, dtype=torch.bool)
    expected = mean_shares(probabilities, real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mean_shares(probabilities, real), expected)


@pytest.mark.parametrize(
    "settings", [{"code_dim": 5}, {"first_temperature": 0.1}, {"last_temperature": 0.0}, {"temperature_decay": 1.1}]
)
def test_quantizers_that_do_not_fit_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        GumbelQuantizer(8, **{"code_dim": 4, **settings})
