"""No leak of the targets, no labels that drift, codebooks in the checkpoint, no NaN without masked frames."""

import torch

from speechbrain_bestrq.masking import MaskedFrames


def test_what_is_masked_does_not_reach_the_encoder(toy):
    """Trap: the targets, or the features they come from, are fed as input.

    Mutation: in bestrq.py, BestRQ.forward, ``torch.where(hidden_frames, noise, features)`` -> ``features + 0 * noise``.
    """
    model = toy.make_model().eval()
    wavs = torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    features, _ = model.speech_encoder.frontend(wavs)
    mask = MaskedFrames.from_mask(torch.arange(25)[None] % 3 == 0)
    other = features.unflatten(1, (25, 4)).clone()
    other[:, mask.mask[0]] += torch.randn(other[:, mask.mask[0]].shape)
    logits, inputs = [], [features, other.flatten(1, 2)]
    model.head.register_forward_hook(lambda module, args, result: logits.append(result))
    noise = torch.randn(1, 100, 80)
    losses = []
    for fed in inputs:
        model.speech_encoder.frontend.forward = lambda wavs, wav_lens, fed=fed: (fed, None)
        losses.append(float(model(wavs, mask=mask, noise=noise).loss.detach()))
    assert torch.equal(logits[0], logits[1])
    assert losses[0] != losses[1]  # the labels did change


def test_nothing_before_the_labels_is_trained(toy, tmp_path):
    """Trap: trainable layers stand before the quantizer, and labels drift.

    Mutation: in quantizer.py, RandomProjectionQuantizer.__init__, ``self.register_buffer("projection", projection)`` ->
    ``self.projection = nn.Parameter(projection)``.
    """
    folder = toy.write_noise(tmp_path / "audio", [0.8, 0.9])
    run = toy.train(tmp_path / "run", folder, updates=3, peak=0.1, checkpoints=False)
    fresh = toy.make_model()
    for part in (run.model.quantizer, run.model.speech_encoder.frontend):
        assert list(part.parameters()) == []
    for name, tensor in fresh.quantizer.state_dict().items():
        assert torch.equal(run.model.quantizer.state_dict()[name], tensor), name


def test_a_checkpoint_holds_projection_and_codebooks(toy):
    """Trap: the codebooks are missing from the checkpoint.

    Mutation: in quantizer.py, RandomProjectionQuantizer.__init__, ``self.register_buffer("codebooks", codebooks)`` ->
    ``self.register_buffer("codebooks", codebooks, persistent=False)``.
    """
    saved = toy.make_model(quantizer_seed=1).state_dict()
    model = toy.make_model(quantizer_seed=2)
    model.load_state_dict(saved)
    expected = toy.make_model(quantizer_seed=1).quantizer
    frames = torch.randn(1, 50, 320)
    assert torch.equal(model.quantizer(frames), expected(frames))


def test_a_batch_without_a_masked_frame_has_a_loss_of_zero_with_its_graph(toy):
    """Trap: the mean over no frame is NaN.

    Mutation: in bestrq.py, BestRQ.forward, ``max(mask.count, 1)`` -> ``mask.count``.
    """
    model = toy.make_model()
    output = model(torch.randn(2, 16000), mask=torch.zeros(2, 25, dtype=torch.bool))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0 and output.num_targets == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
