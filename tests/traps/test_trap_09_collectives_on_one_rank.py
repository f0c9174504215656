"""All ranks take part in every collective, though one alone writes the log."""

import torch


def calls_of_a_rank(toy, monkeypatch, output, rank):
    """The collectives of a run of two updates and a validation, as one rank of two would issue them."""
    calls = []

    def note(name):
        return lambda tensor=None, *arguments, **named: calls.append((name, getattr(tensor, "shape", None)))

    train = toy.write_noise(output / "train", [0.7, 0.8, 0.9, 1.0])
    table = toy.make_table(train)
    with monkeypatch.context() as patch:
        for module in ("pretraining", "progress_log"):
            patch.setattr(f"speechbrain_bestrq.{module}.if_main_process", lambda: rank == 0)
        patch.setattr(torch.distributed, "all_reduce", note("all_reduce"))
        patch.setattr(torch.distributed, "broadcast", note("broadcast"))
        patch.setattr("speechbrain_bestrq.pretraining.ddp_barrier", note("barrier"))
        # a wrapper that talks to other processes has no place in one
        patch.setattr(toy.ToyBrain, "_wrap_distributed", lambda brain: None)
        model = toy.make_model()
        brain = toy.make_brain(output / f"rank{rank}", model, updates=2, epochs=1, checkpoints=False)
        brain.rank, brain.world_size, brain.account.world_size = rank, 2, 2
        samplers = [
            kind(table.lengths, 80000, rank=rank, world_size=2)
            for kind in (toy.LadderBatchSampler, toy.PaddedBatchSampler)
        ]
        loaders = [toy.make_loader(toy.make_dataset(table, model), sampler) for sampler in samplers]
        brain.fit(brain.counter, *loaders)
    return calls


def test_every_rank_issues_the_same_collectives(toy, tmp_path, monkeypatch):
    """Trap: what is guarded by ``if_main_process()`` holds a collective, and the ranks hang.

    Mutation: in pretraining.py, PretrainingBrain.on_fit_batch_end, ``if self.optimizer_step % self.hparams.log_interval
    == 0:`` -> ``if if_main_process() and self.optimizer_step % self.hparams.log_interval == 0:``.
    """
    first, second = (calls_of_a_rank(toy, monkeypatch, tmp_path / str(rank), rank) for rank in (0, 1))
    assert first == second
    assert len([name for name, _ in first if name == "all_reduce"]) >= 2
    assert (tmp_path / "0" / "rank0" / "train_log.jsonl").exists()
    assert not (tmp_path / "1" / "rank1" / "train_log.jsonl").exists()
