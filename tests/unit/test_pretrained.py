"""A pre-trained encoder is the same frozen, fine-tuned, padded, compiled or in bf16; each option does what it says."""

import copy

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from speechbrain.nnet.adapters import AdaptedModel, LoRA

from speechbrain_bestrq.artefact import load_encoder, save_encoder
from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
from speechbrain_bestrq.pretrained import PretrainedEncoder, spec_augment
from speechbrain_bestrq.transformer import TransformerEncoder


@pytest.fixture
def folder(make_speech_encoder, tmp_path):
    """An encoder folder of three layers, with global statistics, dropout and layer drop."""
    speech_encoder = make_speech_encoder(normalize="global", num_layers=3, dropout=0.1, layer_drop=0.2)
    return save_encoder(speech_encoder, tmp_path / "encoder", "# Card")


@pytest.fixture
def wav2vec2_folder(tmp_path):
    """Return a function that makes the folder of a tiny wav2vec 2.0 encoder, of two layers, with dropout."""

    def make(norm="post", num_layers=2, layer_drop=0.5, dropout=0.5):
        torch.manual_seed(1)
        encoder = TransformerEncoder(
            16,
            num_layers,
            num_heads=2,
            d_ffn=32,
            dropout=dropout,
            attention_dropout=dropout,
            layer_drop=layer_drop,
            norm=norm,
            position_groups=2,
        )
        projection = FeatureProjection(8, 16, dropout=dropout)
        speech_encoder = SpeechEncoder(ConvFeatureExtractor((8,) * 7), projection, encoder)
        return save_encoder(speech_encoder, tmp_path / "wav2vec2", "# Card")

    return make


@pytest.fixture
def wavs():
    """Two utterances of half a second."""
    return 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))


def kept_for_backward(encoder, wavs):
    """Count the numbers that a forward pass keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        encoder(wavs)
    return sum(kept)


# ---------------------------------------------------------------- shapes and attributes


def test_it_has_the_attributes_that_recipes_touch(folder):
    encoder = PretrainedEncoder(folder, freeze=True)
    assert (encoder.freeze, encoder.output_dim, encoder.num_layers) == (True, 16, 3)
    assert encoder.output_norm is False and encoder.output_all_hiddens is False
    assert len(encoder.model.encoder.layers) == 3
    extracted = set(encoder.model.feature_extractor.parameters())
    assert extracted == set(encoder.model.subsampling.parameters())


def test_it_gives_the_last_hidden_state_or_all(folder, wavs):
    expected, _ = load_encoder(folder)(wavs, torch.tensor([1.0, 0.5]))
    last = PretrainedEncoder(folder, freeze=True)(wavs, torch.tensor([1.0, 0.5]))
    states = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True)(wavs, torch.tensor([1.0, 0.5]))
    assert torch.equal(states, expected) and torch.equal(last, expected[-1])
    assert states.shape == (4, 2, 12, 16)


def test_each_parameter_has_one_name_and_no_buffer_is_one(folder):
    encoder = PretrainedEncoder(folder)
    parameters = list(encoder.parameters())
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    names = {name for name, _ in encoder.named_parameters()}
    buffers = {"model.frontend.mean", "model.frontend.deviation"}
    assert set(encoder.state_dict()) == names | buffers and not names & buffers
    assert {name.removeprefix("model.") for name in encoder.state_dict()} == set(load_encoder(folder).state_dict())


def test_a_copy_shares_nothing_with_the_original(folder, wavs):
    encoder = PretrainedEncoder(folder)
    other = copy.deepcopy(encoder)
    other.model.feature_extractor._freeze_parameters()
    assert not any(parameter.requires_grad for parameter in other.model.subsampling.parameters())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_waveforms_without_a_batch_are_refused(folder):
    with pytest.raises(ValueError, match=r"shape \(batch, samples\), not \(8000,\)"):
        PretrainedEncoder(folder)(torch.randn(8000))


# ---------------------------------------------------------------- padding and lengths


@pytest.mark.parametrize("attention", ["rotary", "relative"])
@pytest.mark.parametrize("normalize", ["global", "utterance"])
@pytest.mark.parametrize("options", [{}, {"output_norm": True}, {"output_norm": True, "output_rate": 50}])
def test_junk_in_the_padding_changes_no_layer(
    make_speech_encoder, padded_with_junk, relative_difference, tmp_path, attention, normalize, options
):
    speech_encoder = make_speech_encoder(attention, normalize)
    folder = save_encoder(speech_encoder, tmp_path / "encoder", "# Card")
    encoder = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True, **options)
    utterances, batch, wav_lens = padded_with_junk([16000, 9000, 12345])
    together = encoder(batch, wav_lens)
    for number, utterance in enumerate(utterances):
        alone = encoder(utterance[None])[:, 0]
        frames = alone.shape[1]
        for ours, theirs in zip(alone, together[:, number, :frames], strict=True):
            assert relative_difference(ours, theirs) < 1e-5
        assert not together[:, number, frames:].any()


@pytest.mark.parametrize("samples", [16000, 16159, 15990, 12345])
def test_the_last_tenth_of_a_second_matters(folder, samples):
    encoder = PretrainedEncoder(folder, freeze=True)
    wav = 0.1 * torch.randn(1, 20000, generator=torch.Generator().manual_seed(1))
    other = wav.clone()
    other[:, samples - 1600 : samples] = 0.1 * torch.randn(1, 1600, generator=torch.Generator().manual_seed(2))
    wav_lens = torch.tensor([samples / 20000])
    frames = encoder.model.num_frames(samples)
    changed = (encoder(wav, wav_lens) - encoder(other, wav_lens)).abs().amax(-1)[0]
    assert changed[frames - 1] > 1e-3 and not changed[frames:].any()
    # what lies beyond the utterance does not
    assert torch.equal(
        encoder(wav, wav_lens), encoder(torch.cat((wav[:, :samples], 9 + 0 * wav[:, samples:]), 1), wav_lens)
    )


def test_output_norm_is_the_layer_norm_of_the_utterance_alone(folder, wavs, relative_difference):
    plain, normed = (PretrainedEncoder(folder, freeze=True, output_norm=norm) for norm in (False, True))
    expected = torch.nn.functional.layer_norm(plain(wavs), (12, 16))
    assert relative_difference(expected, normed(wavs)) < 1e-5
    assert relative_difference(expected[:1], normed(wavs, torch.tensor([1.0, 0.6]))[:1]) < 1e-5


def test_an_output_rate_of_50_gives_each_frame_twice(folder, wavs):
    slow, fast = (PretrainedEncoder(folder, freeze=True, output_rate=rate)(wavs) for rate in (25, 50))
    assert fast.shape == (2, 24, 16)
    assert torch.equal(fast[:, ::2], slow) and torch.equal(fast[:, 1::2], slow)


@pytest.mark.parametrize(
    "frontend, rate",
    [
        ({"sample_rate": 24000}, 25),
        ({"sample_rate": 22050}, 22050 / 880),  # a hop of 220 samples
        ({"sample_rate": 8000, "hop_ms": 12.5, "window_ms": 50}, 20),
        ({"hop_ms": 200, "window_ms": 200}, 1.25),
    ],
)
def test_an_encoder_of_any_rate_and_hop_is_taken_and_repeated_as_often_as_asked(tmp_path, frontend, rate):
    frontend = LogMel(normalize="utterance", **frontend)
    speech_encoder = SpeechEncoder(
        frontend, ConvSubsampling(d_model=16, channels=(8, 4)), ConformerEncoder(16, 1, 2, 32)
    )
    folder = save_encoder(speech_encoder, tmp_path / "encoder", "# Card")
    wavs = 0.1 * torch.randn(1, 4 * frontend.sample_rate)
    plain = PretrainedEncoder(folder, freeze=True)(wavs)
    assert plain.shape[1] == speech_encoder.num_frames(wavs.shape[1])
    for times in (1, 2, 3):
        repeated = PretrainedEncoder(folder, freeze=True, output_rate=times * rate, apply_spec_augment=True)(wavs)
        assert torch.equal(repeated, plain.repeat_interleave(times, dim=1))
    for other in (0.5 * rate, 1.01 * rate, 2.01 * rate, 1e-9, -rate):
        with pytest.raises(InputError, match=f"this encoder has {rate:.6g} frames a second; give that, or a multiple"):
            PretrainedEncoder(folder, output_rate=other)


def test_an_encoder_of_less_than_a_frame_a_second_is_taken_and_one_of_none_refused(tmp_path):
    def folder(*strides):
        count = len(strides)
        frontend = ConvFeatureExtractor((8,) * count, kernel_sizes=(3,) * count, strides=strides)
        encoder = TransformerEncoder(16, num_layers=1, num_heads=2, d_ffn=32, position_groups=2)
        return save_encoder(SpeechEncoder(frontend, FeatureProjection(8, 16), encoder), tmp_path / f"{count}", "# Card")

    slow = folder(200, 160)
    assert PretrainedEncoder(slow, freeze=True)(torch.randn(1, 50000)).shape == (1, 2, 16)
    assert PretrainedEncoder(slow, output_rate=0.5)._repeats == 1
    with pytest.raises(InputError, match="output_rate is 1.2: this encoder has 0.5 frames a second"):
        PretrainedEncoder(slow, output_rate=1.2)
    with pytest.raises(InputError, match="is no encoder of speech: its frames are more than"):
        PretrainedEncoder(folder(*[2**17] * 4))


@pytest.mark.parametrize("rate", [0, 20, 40, 49])
def test_another_output_rate_is_refused(folder, rate):
    with pytest.raises(InputError, match=f"output_rate is {rate}: this encoder has 25 frames a second"):
        PretrainedEncoder(folder, output_rate=rate)


# ---------------------------------------------------------------- frozen and trained


def test_frozen_means_no_gradient_no_dropout_and_nothing_kept(folder, wavs):
    encoder = PretrainedEncoder(folder, freeze=True, apply_spec_augment=True).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoded = encoder(wavs.requires_grad_())
    assert not encoded.requires_grad and torch.equal(encoded, encoder(wavs))
    assert kept_for_backward(encoder, wavs) == 0


def test_what_is_not_frozen_gets_a_gradient_in_every_parameter(folder, wavs):
    encoder = PretrainedEncoder(folder)
    assert encoder.training and encoder.model.encoder.training
    torch.manual_seed(1)
    encoder(wavs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_lowest_layers_can_be_frozen_with_what_is_below_them(folder, wavs, count):
    encoder = PretrainedEncoder(folder, freeze_layers=count).train()
    encoder(wavs).square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    parts = (*(f"model.encoder.layers.{number}." for number in range(count, 3)), "model.encoder.norm.")
    assert trained == {name for name, _ in encoder.named_parameters() if name.startswith(parts)}
    modes = [layer.training for layer in encoder.model.encoder.layers]
    assert modes == [number >= count for number in range(3)] and not encoder.model.subsampling.training


def test_what_is_frozen_at_the_bottom_keeps_nothing_for_the_backward_pass(folder, wavs):
    kept = [kept_for_backward(PretrainedEncoder(folder, freeze_layers=count).eval(), wavs) for count in range(4)]
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2] > 10 * kept[3] > 0


def test_layers_are_dropped_as_in_pre_training_or_as_one_says(make_speech_encoder, tmp_path):
    folder = save_encoder(make_speech_encoder(layer_drop=0.9), tmp_path / "encoder", "# Card")
    wavs = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    skipped = []
    for chosen in (None, 0.0):
        encoder = PretrainedEncoder(folder, layer_drop=chosen, output_all_hiddens=True).train()
        torch.manual_seed(1)
        skipped.append(sum(bool((states[1] == states[0]).all()) for states in (encoder(wavs) for _ in range(10))))
    assert skipped[0] > 5 and skipped[1] == 0
    with pytest.raises(InputError, match="layer_drop is 1: give a probability, below 1"):
        PretrainedEncoder(folder, layer_drop=1)


@pytest.mark.parametrize("kind", ["conformer", "wav2vec2"])
def test_frozen_layers_are_never_dropped_and_those_above_are(make_speech_encoder, wav2vec2_folder, tmp_path, kind):
    if kind == "conformer":
        folder = save_encoder(make_speech_encoder(num_layers=4, layer_drop=0.9), tmp_path / "encoder", "# Card")
    else:
        folder = wav2vec2_folder("pre", num_layers=4, layer_drop=0.9)
    encoder = PretrainedEncoder(folder, freeze_layers=2, output_all_hiddens=True).train()
    wavs = 0.1 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(1))
    dropped = torch.zeros(3)
    torch.manual_seed(1)
    for _ in range(20):
        encoder.zero_grad()
        states = encoder(wavs)
        dropped += (states[1:4] == states[:3]).flatten(1).all(1)
        states[-1].square().sum().backward()
        # so DDP, which waits for each, need not search for unused ones
        for name, parameter in encoder.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
    assert dropped[:2].tolist() == [0, 0] and 12 <= dropped[2] <= 20


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_wav2vec2_encoder_is_frozen_below_its_layers_too(wav2vec2_folder, norm):
    folder = wav2vec2_folder(norm)
    encoder = PretrainedEncoder(folder, freeze_layers=1, output_all_hiddens=True).train()
    wavs = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    states = encoder(wavs)
    expected = PretrainedEncoder(folder, freeze=True, output_all_hiddens=True)(wavs)
    assert torch.equal(states[:2], expected[:2]) and not torch.equal(states[2], expected[2])
    states.square().sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    parts = ("model.encoder.layers.1.", *(["model.encoder.norm."] if norm == "pre" else []))
    assert trained == {name for name, _ in encoder.named_parameters() if name.startswith(parts)}


def test_a_wav2vec2_encoder_has_50_frames_a_second(wav2vec2_folder):
    folder = wav2vec2_folder("post")
    assert PretrainedEncoder(folder)(torch.zeros(1, 32000)).shape[1] in (99, 100)
    with pytest.raises(InputError, match="output_rate is 25: this encoder has 50 frames a second"):
        PretrainedEncoder(folder, output_rate=25)
    with pytest.raises(InputError, match="apply_spec_augment is for encoders of mel features"):
        PretrainedEncoder(folder, apply_spec_augment=True)
    frozen = PretrainedEncoder(folder, freeze_feature_extractor=True).train()
    assert not any(parameter.requires_grad for parameter in frozen.model.frontend.parameters())
    assert not frozen.model.frontend.training and frozen.model.encoder.training
    # the projection is trained, as in the lobe, but where the layers above it rest too
    assert all(parameter.requires_grad for parameter in frozen.model.subsampling.parameters())
    assert frozen.model.subsampling.training
    layers = PretrainedEncoder(folder, freeze_layers=1).train()
    for part in (layers.model.frontend, layers.model.subsampling):
        assert not part.training and not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("count", [-1, 4])
def test_more_layers_than_there_are_cannot_be_frozen(folder, count):
    with pytest.raises(InputError, match=f"freeze_layers is {count}: .* has 3 layers"):
        PretrainedEncoder(folder, freeze_layers=count)


@pytest.mark.parametrize("later", [False, True])
def test_front_end_and_convolutions_can_be_frozen(folder, wavs, later):
    encoder = PretrainedEncoder(folder, freeze_feature_extractor=not later)
    if later:
        encoder.model.feature_extractor._freeze_parameters()
    encoder.train()
    encoder(wavs).square().sum().backward()
    frozen = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert frozen == {name for name, _ in encoder.named_parameters() if name.startswith("model.subsampling.")}
    assert not encoder.model.subsampling.training and encoder.model.encoder.training


# ---------------------------------------------------------------- SpecAugment


def test_spec_augment_is_for_training_what_is_not_frozen(make_speech_encoder, tmp_path):
    folder = save_encoder(make_speech_encoder(), tmp_path / "encoder", "# Card")
    wavs = 0.1 * torch.randn(4, 32000, generator=torch.Generator().manual_seed(1))
    plain = PretrainedEncoder(folder, freeze=True)(wavs)
    augmented, frozen = (PretrainedEncoder(folder, apply_spec_augment=True, freeze=freeze) for freeze in (False, True))
    assert torch.equal(frozen.train()(wavs), plain) and torch.equal(augmented.eval()(wavs), plain)
    augmented.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augmented(wavs))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], plain, atol=1e-3)


def test_spec_augment_hides_spans_in_time_and_frequency_of_each_utterance():
    torch.manual_seed(1)
    hidden = spec_augment(torch.ones(200, 1000, 80), torch.full((200,), 900)) == 0
    frames, bins = hidden.all(2)[:, :900].float(), hidden[:, 900:].all(1).float()
    assert frames.mean().item() == pytest.approx(0.05, abs=0.01)
    assert bins.mean().item() == pytest.approx(0.1, abs=0.02)
    assert len({tuple(row.tolist()) for row in bins}) > 100  # each utterance has its own
    edges = torch.nn.functional.pad(frames, (1, 1)).diff(dim=1)
    starts, ends = edges.eq(1).nonzero(), edges.eq(-1).nonzero()
    inside = (starts[:, 1] > 0) & (ends[:, 1] < 900)
    assert (ends[inside, 1] - starts[inside, 1]).min() == 20


# ---------------------------------------------------------------- untrained


def test_random_gives_fresh_weights_by_the_global_seed_and_the_same_statistics(folder):
    trained = PretrainedEncoder(folder).state_dict()
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(PretrainedEncoder(f"random:{folder}").state_dict())
    weight = "model.encoder.layers.0.attention.qkv.weight"
    assert torch.equal(states[0][weight], states[1][weight]) and not torch.equal(states[0][weight], states[2][weight])
    assert not torch.equal(states[0][weight], trained[weight])
    assert torch.equal(states[0]["model.encoder.norm.weight"], torch.ones(16))
    for name in ("model.frontend.mean", "model.frontend.deviation"):
        assert torch.equal(states[0][name], trained[name])


def test_loading_a_trained_encoder_leaves_the_global_generator_as_it_was(folder):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    PretrainedEncoder(folder)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- files


def test_a_file_of_any_rate_and_channels_is_encoded(folder, tmp_path, relative_difference):
    generator = np.random.default_rng(1)
    stereo = 0.1 * generator.standard_normal((22050, 2))
    soundfile.write(tmp_path / "a.flac", stereo, 44100)
    encoder = PretrainedEncoder(folder)
    found = encoder.encode_file(tmp_path / "a.flac")
    assert encoder.training and not found.requires_grad
    mono = torch.from_numpy(soundfile.read(tmp_path / "a.flac", dtype="float32")[0].mean(1))
    wav = torchaudio.functional.resample(mono, 44100, 16000)
    assert relative_difference(PretrainedEncoder(folder, freeze=True)(wav[None]), found) < 1e-4


def test_a_file_has_as_many_frames_as_a_folder_of_it(folder, tmp_path):
    """3085 samples at 44.1 kHz are 1119.27 at 16 kHz: a frame of 40 ms, where 1120 were two."""
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(3085), 44100)
    table = AudioTable(["a"], [str(tmp_path / "a.wav")], [3085 / 44100], 16000)
    encoder = PretrainedEncoder(folder, freeze=True)
    assert encoder.encode_file(tmp_path / "a.wav").shape[1] == encoder.num_frames(int(table.lengths[0]))


def test_a_file_that_is_no_audio_or_too_short_is_named(folder, tmp_path):
    encoder = PretrainedEncoder(folder, freeze=True)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16000)
    soundfile.write(tmp_path / "streamed.flac", np.zeros(16000), 16000)
    header = bytearray((tmp_path / "streamed.flac").read_bytes())
    header[21] &= 0xF0  # the 36 bits of the length are 0 where it was not known
    header[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(header)
    for name in ("text.wav", "short.wav", "missing.wav", "streamed.flac"):
        with pytest.raises(InputError, match=name) as refusal:
            encoder.encode_file(tmp_path / name)
        assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- precision, compilation, adapters


@pytest.mark.parametrize("freeze", [True, False])
def test_bf16_is_near_fp32_and_trains(folder, wavs, relative_difference, freeze):
    encoder = PretrainedEncoder(folder, freeze=freeze, output_all_hiddens=True, output_norm=True).eval()
    wav_lens = torch.tensor([1.0, 0.6])
    expected = encoder(wavs, wav_lens).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = encoder(wavs, wav_lens)
    assert found.isfinite().all() and relative_difference(expected, found.detach().float()) < 0.05
    if not freeze:
        found.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_compiled_it_is_the_same(folder, wavs, relative_difference, freeze):
    encoder = PretrainedEncoder(folder, freeze=freeze, output_norm=True).eval()
    compiled = torch.compile(encoder, backend="eager")  # what is traced, without minutes of a C++ compiler
    wav_lens = torch.tensor([1.0, 0.6])
    for width in (8000, 6400):
        expected, found = encoder(wavs[:, :width], wav_lens), compiled(wavs[:, :width], wav_lens)
        assert relative_difference(expected, found) < 1e-5 and found.requires_grad != freeze
    compiled.train()
    assert encoder.model.encoder.training != freeze


@pytest.mark.parametrize("kind", ["conformer", "wav2vec2"])
def test_compiled_it_trains_the_same(make_speech_encoder, wav2vec2_folder, relative_difference, tmp_path, wavs, kind):
    """Without dropout, which a compiler may draw in another order, but with layer drop: of the third layer."""
    if kind == "conformer":
        folder = save_encoder(make_speech_encoder(num_layers=3, layer_drop=0.5), tmp_path / "encoder", "# Card")
    else:
        folder = wav2vec2_folder(num_layers=3, dropout=0.0)
    encoder = PretrainedEncoder(folder, output_norm=True, freeze_layers=1)
    twin = copy.deepcopy(encoder)
    compiled = torch.compile(twin, backend="aot_eager")  # forward and backward are traced, without a C++ compiler
    compiled.train()
    results = []
    for model, owner in ((encoder, encoder), (compiled, twin)):
        torch.manual_seed(0)
        encoded = model(wavs, torch.tensor([1.0, 0.6]))
        (encoded * encoded.detach().sin()).sum().backward()
        results.append(
            {name: parameter.grad for name, parameter in owner.named_parameters() if parameter.requires_grad}
        )
        results[-1]["output"] = encoded.detach()
    for name, ours in results[0].items():
        theirs = results[1][name]
        if ".layers.2." in name:
            assert not ours.any() and theirs is not None and not theirs.any(), name
        else:
            assert relative_difference(ours, theirs) < 1e-4, name


def test_lora_reaches_query_key_and_value_and_trains_only_adapters(folder, wavs):
    adapted = AdaptedModel(
        PretrainedEncoder(folder), LoRA, target_layers=["*.attention.qkv"], adapter_kwargs={"rank": 2}
    )
    assert (adapted.output_dim, adapted.freeze) == (16, False)
    adapted.eval()
    assert torch.equal(adapted(wavs), PretrainedEncoder(folder, freeze=True)(wavs))  # they start at zero
    adapted.train()
    assert not adapted.model.subsampling.training and adapted.model.encoder.layers[0].training
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    optimizer = torch.optim.Adam(adapted.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):  # the first update only moves the upper of the two factors away from zero
        torch.manual_seed(2)
        adapted(wavs).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    layers = [f"adapted_model.model.encoder.layers.{number}.attention.qkv" for number in range(3)]
    assert changed == {f"{layer}.adapter_{side}_proj.weight" for layer in layers for side in ("down", "up")}


def test_adapters_in_a_frozen_encoder_are_refused_before_a_step(folder):
    adapted = AdaptedModel(PretrainedEncoder(folder, freeze=True), LoRA, target_layers=["*.qkv"])
    with pytest.raises(InputError, match="freeze: True runs the encoder without gradients.*set freeze: False"):
        adapted.train()
