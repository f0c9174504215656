"""With --compile, graphs are compiled for the shapes of an epoch, and then no more."""

import pytest
import torch

from speechbrain_bestrq.batching import LadderBatchSampler
from speechbrain_bestrq.pretraining import PretrainingBrain


@pytest.mark.parametrize(("method", "layer_drop"), [("bestrq", 0.0), ("wav2vec2", 0.0), ("bestrq", 0.3)])
def test_nothing_is_compiled_anew_after_the_first_epoch(method, layer_drop, toy, tmp_path, monkeypatch):
    """Masks, their number, dropout, layer drop, the update's number and a validation leave the graphs as they are.

    With layer drop, a shape whose layers are all dropped in the first epoch is compiled when one is not.
    """
    compiled_after, brains = [], []
    compile_brain, compile_module = PretrainingBrain._compile, torch.nn.Module.compile

    def count(graph, inputs):
        compiled_after.append(brains[0].optimizer_step)
        return graph.forward

    def compile_and_count(module, **options):
        compile_module(module, backend=count, dynamic=options["dynamic"], fullgraph=options["fullgraph"])

    def remember(brain):
        brains.append(brain)
        compile_brain(brain)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_and_count)
    monkeypatch.setattr(PretrainingBrain, "_compile", remember)
    torch._dynamo.reset()
    noise = toy.write_noise(tmp_path / "audio", [1.0] * 8 + [1.5] * 8 + [2.0] * 8)
    model = {"method": method, "dropout": 0.1, "layer_drop": layer_drop}
    done = toy.train(tmp_path / "run", noise, noise, model=model, updates=None, epochs=4, compile=True)
    epoch = list(LadderBatchSampler(toy.make_table(noise).lengths, 5 * toy.RATE))
    assert done.brain.optimizer_step == 4 * len(epoch)
    # one for each shape, which all layers share
    assert len(compiled_after) == len({(len(plan.indices), plan.samples) for plan in epoch}) == 5
    assert layer_drop or max(compiled_after) < len(epoch)
    assert not torch._dynamo.config.optimize_ddp  # which would make several of each on several devices
