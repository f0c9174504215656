"""Features are normalised once and for all, in pre-training and after it."""

import torch

from speechbrain_bestrq.artefact import load_encoder, save_encoder


def test_the_statistics_do_not_move_in_training(toy, tmp_path):
    """Trap: the "global" mean goes on moving with what is heard, so labels and inputs drift.

    Mutation: in frontend.py, LogMel.forward, before ``features = (features - self.mean) / self.deviation`` add
    ``self.mean.lerp_(features.mean((0, 1)), 0.1)``.
    """
    folder = toy.write_noise(tmp_path / "audio", [0.8, 0.9, 1.0, 1.1])
    run = toy.train(tmp_path / "run", folder, updates=3, model={"normalize": "global"}, checkpoints=False)
    frontend = run.model.speech_encoder.frontend
    measured = toy.make_model(normalize="global").speech_encoder.frontend
    order = toy.make_loader(toy.make_dataset(toy.make_table(folder), run.model), type(run.sampler)(
        run.sampler.lengths, run.sampler.max_batch_samples, seed=1))  # fmt: skip
    measured.measure([(batch.wavs, batch.wav_lens) for batch in order])
    assert torch.equal(frontend.mean, measured.mean) and torch.equal(frontend.deviation, measured.deviation)


def test_what_is_done_with_an_encoder_normalises_as_its_pre_training(toy, tmp_path):
    """Trap: pre-trained with ``sentence`` normalisation, fine-tuned with another.

    Mutation: in artefact.py, load_encoder, before ``return speech_encoder.eval()`` add
    ``speech_encoder.frontend.normalize = "utterance"``.
    """
    model = toy.make_model(normalize="global")
    wavs = torch.randn(2, 16000, generator=torch.Generator().manual_seed(1))
    model.measure([(wavs, None)])
    loaded = load_encoder(save_encoder(model.speech_encoder, tmp_path / "encoder", "# A card"))
    expected, _ = model.speech_encoder.frontend(3 * wavs)
    assert torch.equal(loaded.frontend(3 * wavs)[0], expected)
