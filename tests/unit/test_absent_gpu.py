"""A step of training on a GPU, as far as a machine without one can tell."""

import numpy as np
import pytest
import torch

from speechbrain_bestrq.attention import RelativeAttention, RotaryAttention


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("bestrq", {"attention": "relative"}),
        ("bestrq", {"grid": True}),
        ("wav2vec2", {"extractor_norm": "layer", "norm": "pre", "normalize_input": True}),
    ],
)
def test_a_step_mixes_no_devices_and_waits_for_none(method, settings, toy, tmp_path, absent_gpu):
    """What the recipes' YAMLs do not have; those are tested with their recipes."""
    model = toy.make_model(method, dropout=0.1, layer_drop=0.5, **settings)
    waves = np.random.default_rng(1).standard_normal((2, 16000))
    with absent_gpu.first_step_there(toy.ToyBrain):
        batch = toy.make_batch(model, [waves[0], waves[1, :12000]])
        toy.fit_batches(tmp_path, model, [batch] * 2, log_interval=5, max_grad_norm=1.0, spike_ratio=20.0)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda wavs: wavs + torch.zeros(3), "found two different devices cuda:0, cpu"),
        (lambda wavs: wavs[wavs > 0], "nonzero"),
        (lambda wavs: float(wavs.sum()), "_local_scalar_dense"),
        (lambda wavs: wavs.sum().cpu().tolist(), "_local_scalar_dense"),
    ],
)
def test_what_a_gpu_would_refuse_or_wait_for_is_noticed(step, message, absent_gpu):
    with absent_gpu.absent_gpu(), pytest.raises(Exception, match=message):
        step(absent_gpu.move(torch.ones(3)))


def test_autocast_is_that_of_a_gpu(absent_gpu):
    with absent_gpu.absent_gpu(), torch.autocast("cuda", torch.bfloat16):
        weights = absent_gpu.move(torch.ones(3, 3))
        assert (weights @ weights).dtype == torch.bfloat16
        assert (weights @ weights).device == torch.device("cuda:0")


@pytest.mark.parametrize(("method", "settings"), [("bestrq", {}), ("wav2vec2", {"norm": "pre"}), ("wav2vec2", {})])
def test_all_layers_take_float32_under_autocast(method, settings, toy, absent_gpu):
    """What is before the first one ends in half precision, and all others end in a norm, or a sum, in float32."""
    encoder, taken = toy.make_model(method, **settings).speech_encoder.encoder, []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, given: taken.append(given[0].dtype))
    with absent_gpu.absent_gpu(), torch.autocast("cuda", torch.bfloat16):
        absent_gpu.move_module(encoder)
        encoder(absent_gpu.move(torch.ones(1, 5, encoder.d_model, dtype=torch.bfloat16)))
    assert taken == [torch.float32] * len(encoder.layers)


@pytest.mark.parametrize("attention", [RotaryAttention, RelativeAttention])
def test_a_replica_that_has_the_tables_of_another_device_attends(attention, absent_gpu):
    """As those of torch.nn.DataParallel, which sends parameters and buffers alone."""
    module = attention(8, 2)
    tables = {name: getattr(module, name) for name in module.tables}
    with absent_gpu.absent_gpu():
        absent_gpu.move_module(module)
        vars(module).update(tables)
        assert module(absent_gpu.move(torch.ones(1, 5, 8))).device == torch.device("cuda:0")
