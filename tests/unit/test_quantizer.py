"""Properties of BEST-RQ's labels."""

import pytest
import torch
from speechbrain.nnet.quantisers import RandomProjectionQuantizer as SpeechBrainQuantizer
from torch.nn.functional import normalize

from speechbrain_bestrq import quantizer as module
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer

DIM = 32


def frames(*shape, seed=0):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def correlated(count=2000, seed=0):
    """Frames with a mean and correlations, of dimensions whose variances differ a thousandfold."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(DIM, DIM, generator=generator) * torch.logspace(0, -1.5, DIM)
    return torch.randn(count, DIM, generator=generator) @ mix + 3.0


def squared_distances(x, projection, codebook, dim):
    """Of the projected and normalised frames from every code, float64, shape (..., codes)."""
    projected = normalize(x.double() @ projection.double(), dim=dim)
    return torch.cdist(projected, codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")


def assert_nearest(labels, distances):
    """Labels are those of the distances on 99.99 % of frames, and elsewhere the two best are within 1e-5."""
    best, nearest = distances.min(-1)
    differ = labels != nearest
    assert differ.double().mean() <= 1e-4
    chosen = distances.gather(-1, labels[..., None]).squeeze(-1)
    assert (chosen - best).max() <= 1e-5


@pytest.mark.parametrize("num_codebooks", [1, 3])
@pytest.mark.parametrize("normalization, dim", [("feature", -1), ("time", -2)])
def test_labels_are_the_nearest_codes_of_a_float64_brute_force(num_codebooks, normalization, dim):
    quantizer = RandomProjectionQuantizer(
        DIM, codebook_size=512, num_codebooks=num_codebooks, normalize=normalization, seed=3
    )
    x = frames(10, 300)
    labels = quantizer(x)
    assert labels.shape == (10, 300, num_codebooks) and labels.dtype == torch.int64
    for book in range(num_codebooks):
        distances = squared_distances(x, quantizer.projection[book], quantizer.codebooks[book], dim)
        assert_nearest(labels[..., book], distances)


def test_labels_equal_speechbrains_with_its_projection_and_codebook():
    torch.manual_seed(0)
    theirs = SpeechBrainQuantizer(DIM, 16, 256)
    ours = RandomProjectionQuantizer(DIM, codebook_size=256)
    ours.projection[0], ours.codebooks[0] = theirs.P, theirs.CB
    x = frames(20, 100)
    expected = torch.cat([theirs(row[None]) for row in x])
    labels = ours(x)[..., 0]
    assert (labels == expected).double().mean() >= 0.9999
    assert_nearest(labels, squared_distances(x, theirs.P, theirs.CB, -1))


@pytest.mark.parametrize("normalization", ["feature", "time"])
def test_autocast_changes_no_label(normalization):
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=1024, normalize=normalization)
    x = frames(2, 400)
    expected = quantizer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize("normalization", ["feature", "time"])
def test_labels_do_not_depend_on_company_padding_or_order(normalization):
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=256, normalize=normalization)
    lengths = (60, 41, 7)
    batch = torch.zeros(3, 60, DIM)
    for row, length in zip(batch, lengths, strict=True):
        row[:length] = frames(length, seed=length)
    together = quantizer(batch)
    assert torch.equal(quantizer(batch.flip(0)).flip(0), together)
    for row, labels, length in zip(batch, together, lengths, strict=True):
        assert torch.equal(quantizer(row[None, :length])[0], labels[:length])


def test_a_frames_labels_depend_on_the_frame_alone():
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=256)
    assert quantizer.pointwise
    x = frames(3, 50)
    order = torch.randperm(150)
    assert torch.equal(quantizer(x.flatten(0, 1)[order]), quantizer(x).flatten(0, 1)[order])


def test_normalisation_over_time_does_look_at_the_utterance():
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=256, normalize="time")
    assert not quantizer.pointwise
    x = frames(1, 50)
    x[0, 0] *= 20.0
    assert (quantizer(x)[:, 1:] != quantizer(x[:, 1:])).double().mean() > 0.05


@pytest.mark.parametrize("frames_in_chunk", [1, 7, 64])
@pytest.mark.parametrize("normalization", ["feature", "time"])
def test_chunks_change_no_label(normalization, frames_in_chunk, monkeypatch):
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=128, num_codebooks=2, normalize=normalization)
    x = frames(3, 50)
    expected = quantizer(x)
    monkeypatch.setattr(module, "CHUNK_SCORES", frames_in_chunk * 128)
    assert torch.equal(quantizer(x), expected)


def test_building_leaves_the_global_generator_alone_and_ignores_it():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = RandomProjectionQuantizer(DIM, codebook_size=64, num_codebooks=2, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = RandomProjectionQuantizer(DIM, codebook_size=64, num_codebooks=2, seed=5)
    for name, buffer in first.state_dict().items():
        assert torch.equal(buffer, second.state_dict()[name]), name


def test_seeds_and_codebooks_differ():
    first = RandomProjectionQuantizer(DIM, codebook_size=64, num_codebooks=2, seed=5)
    other = RandomProjectionQuantizer(DIM, codebook_size=64, num_codebooks=2, seed=6)
    for name in ("projection", "codebooks"):
        assert not torch.equal(getattr(first, name), getattr(other, name))
        assert not torch.equal(getattr(first, name)[0], getattr(first, name)[1])


def test_codes_have_unit_length_and_the_projection_is_xavier_uniform():
    quantizer = RandomProjectionQuantizer(320, codebook_size=512)
    assert torch.allclose(quantizer.codebooks.norm(dim=-1), torch.ones(1, 512))
    bound = (6 / (320 + 16)) ** 0.5
    assert 0.95 * bound < quantizer.projection.abs().max() <= bound
    assert quantizer.projection.std() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_codes_lie_in_all_directions_alike():
    codes = RandomProjectionQuantizer(320, codebook_size=2048).codebooks[0]
    cosines = (codes @ codes.t()).fill_diagonal_(0.0)
    assert codes.mean(0).abs().max() < 0.02
    assert abs(float(cosines.mean())) < 1e-3
    assert float(cosines.square().mean()) == pytest.approx(1 / 16, rel=0.02)  # as of any directions in 16 dimensions


def test_a_seed_has_the_labels_that_it_always_had():
    """Encoders that were trained on them, and runs that go on, have no others; none is near a border."""
    waves = torch.sin(torch.arange(6 * 320).double().square() * 0.37).float().view(1, 6, 320)
    labels = RandomProjectionQuantizer(320, num_codebooks=2, seed=0)(waves)
    assert labels[0].t().tolist() == [[5974, 8051, 6730, 5489, 5247, 3645], [5101, 3377, 2387, 3930, 4750, 5246]]


def test_nothing_is_trainable_and_everything_is_in_the_state_dict():
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64)
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {"projection", "offset", "codebooks"}


@pytest.mark.parametrize("whiten", [None, 20])
def test_a_state_dict_restores_the_labels_whatever_the_seed(whiten):
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64, seed=5, whiten=whiten)
    if whiten:
        quantizer.fit([correlated()])
    restored = RandomProjectionQuantizer(DIM, codebook_size=64, seed=6, whiten=whiten)
    restored.load_state_dict(quantizer.state_dict())
    assert restored.measured
    assert torch.equal(restored(correlated(100)), quantizer(correlated(100)))


def test_an_unmeasured_whitening_refuses_to_label_even_after_a_round_trip():
    restored = RandomProjectionQuantizer(DIM, codebook_size=64, whiten=20)
    restored.load_state_dict(RandomProjectionQuantizer(DIM, codebook_size=64, whiten=20).state_dict())
    assert not restored.measured
    with pytest.raises(RuntimeError, match="has not been measured"):
        restored(frames(1, 5))


@pytest.mark.parametrize("kept", [16, 20, DIM])
def test_whitened_frames_meet_the_codebook_with_unit_variance_in_every_direction(kept):
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64, num_codebooks=2, whiten=kept)
    x = correlated()
    quantizer.fit(x.split(300))
    for projection, offset in zip(quantizer.projection.double(), quantizer.offset.double(), strict=True):
        whitened = x.double() @ projection - offset
        assert whitened.mean(0).abs().max() <= 1e-3
        assert (whitened.t() @ whitened / len(x) - torch.eye(16)).abs().max() <= 1e-3


@pytest.mark.parametrize("kept", [16, 20])
def test_whitening_keeps_the_components_of_the_greatest_variance_alone(kept):
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64, whiten=kept)
    x = correlated()
    quantizer.fit([x])
    _, components = torch.linalg.eigh(x.double().t().cov())
    shares = (components.t() @ quantizer.projection[0].double()).norm(dim=1)
    assert shares[: DIM - kept].max() <= 1e-4 * shares.max()
    assert shares[DIM - kept :].min() > 1e-2 * shares.max()


def test_directions_without_variance_are_not_blown_up():
    x = correlated()
    x[:, 1] = x[:, 0]
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64, whiten=DIM)
    quantizer.fit([x])
    assert quantizer.projection.isfinite().all()
    assert (x @ quantizer.projection[0] - quantizer.offset[0]).abs().max() <= 100


def test_measuring_twice_is_measuring_once():
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64, whiten=20)
    quantizer.fit([correlated()])
    once = {name: buffer.clone() for name, buffer in quantizer.state_dict().items()}
    quantizer.fit([correlated()])
    assert all(torch.equal(once[name], buffer) for name, buffer in quantizer.state_dict().items())


def test_whitening_spreads_the_labels():
    x = correlated()
    plain = RandomProjectionQuantizer(DIM, codebook_size=256)
    whitened = RandomProjectionQuantizer(DIM, codebook_size=256, whiten=DIM)
    whitened.fit([x])
    assert whitened(x).unique().numel() > 2 * plain(x).unique().numel()


def test_too_few_frames_to_whiten_are_refused_and_nothing_is_changed():
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=64, whiten=20)
    before = quantizer.projection.clone()
    with pytest.raises(ValueError, match="20 frames are too few to find 20"):
        quantizer.fit([correlated(20)])
    assert not quantizer.measured
    assert torch.equal(quantizer.projection, before)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'batch'"):
        RandomProjectionQuantizer(DIM, normalize="batch")
    for whiten in (15, DIM + 1):
        with pytest.raises(ValueError, match="number of components"):
            RandomProjectionQuantizer(DIM, whiten=whiten)
    with pytest.raises(ValueError, match="does not whiten"):
        RandomProjectionQuantizer(DIM, codebook_size=64).fit([correlated()])


def test_whitening_and_normalisation_over_time_exclude_each_other():
    # zeros in the padding would become -offset and count in the length over time: labels would depend on padding
    with pytest.raises(ValueError, match="time"):
        RandomProjectionQuantizer(DIM, codebook_size=64, normalize="time", whiten=20)


@pytest.mark.parametrize("normalization", ["feature", "time"])
def test_with_utterance_norm_labels_know_nothing_of_gain_and_colour(normalization):
    settings = {"codebook_size": 256, "normalize": normalization}
    quantizer = RandomProjectionQuantizer(DIM, utterance_norm=True, **settings)
    x, lengths = frames(2, 50), torch.tensor([50, 31])
    gain, colour = torch.linspace(0.5, 3, DIM), torch.linspace(-4, 4, DIM)
    labels = quantizer(x, lengths)
    changed = quantizer(x * gain + colour, lengths)
    assert (labels == changed)[0].double().mean() > 0.99 and (labels == changed)[1, :31].double().mean() > 0.99
    plain = RandomProjectionQuantizer(DIM, **settings)
    assert (plain.settings()["utterance_norm"], quantizer.settings()["utterance_norm"]) == (False, True)
    assert (plain(x) == plain(x + colour)).double().mean() < 0.5
    # as though each channel of the utterance alone were standardised
    own = x[1, :31]
    standard = (own - own.mean(0)) / own.std(0, correction=0)
    assert (plain(standard[None])[0] == labels[1, :31]).double().mean() > 0.99


def test_with_utterance_norm_padding_is_no_part_of_the_utterance():
    quantizer = RandomProjectionQuantizer(DIM, codebook_size=256, utterance_norm=True)
    x = frames(1, 40)
    padded = torch.cat([x, torch.full((1, 25, DIM), 9.0)], 1)
    assert torch.equal(quantizer(x), quantizer(padded, torch.tensor([40]))[:, :40])
    assert not torch.equal(quantizer(x), quantizer(padded)[:, :40])
