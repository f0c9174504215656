"""Each epoch has batches of its own."""


def test_epochs_differ(toy, tmp_path):
    """Trap: nobody tells the batch sampler its epoch, and every epoch has the same batches.

    Mutation: in pretraining.py, PretrainingBrain.on_stage_start, ``self.sampler.set_epoch(epoch)`` ->
    ``self.sampler.set_epoch(1), setattr(self.sampler, "position", 0)``.
    """
    folder = toy.write_noise(tmp_path / "audio", [0.6] * 12)
    run = toy.train(tmp_path / "run", folder, max_batch_seconds=1.9, epochs=2, updates=None, checkpoints=False)
    heard = [batch for _, batch in run.seen]
    assert len(heard) == 8
    assert sorted(sum(heard[:4], [])) == sorted(sum(heard[4:], [])) == list(range(12))
    assert sorted(map(sorted, heard[:4])) != sorted(map(sorted, heard[4:]))
