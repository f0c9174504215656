"""The pre-trained encoder in Brains built as SpeechBrain's wav2vec2 recipes build theirs, frozen and not."""

from pathlib import Path

import pytest
import speechbrain as sb
import torch
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.parameter_transfer import Pretrainer

from speechbrain_bestrq import PretrainedEncoder, WeightedEncoder, save_encoder

RECIPES = ["CTC", "IEMOCAP", "SLURP"]


@pytest.fixture(scope="module")
def swapped(load_script):
    """The module tests/helpers/swapped.py."""
    return load_script(Path(__file__).parents[1] / "helpers" / "swapped.py")


@pytest.fixture
def folder(make_speech_encoder, tmp_path):
    """An encoder folder; the encoder has dropout and layer drop, which would tell a thawed one from a frozen."""
    speech_encoder = make_speech_encoder(normalize="global", dropout=0.1, layer_drop=0.2)
    return save_encoder(speech_encoder, tmp_path / "encoder", "# Card")


def same(one, other):
    """Whether two states are bit-identical."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_frozen_encoder_goes_through_fit_untouched_and_in_eval_mode(swapped, folder, tmp_path, recipe):
    brain = swapped.fit(recipe, folder, tmp_path / "save", freeze_wav2vec2=True)
    assert brain.modes == {False} and brain.hparams.wav2vec2.freeze
    assert all(loss == loss for loss in brain.losses)
    fresh = PretrainedEncoder(folder)
    assert same(dict(brain.hparams.wav2vec2.state_dict()), dict(fresh.state_dict()))
    assert same(dict(brain.hparams.wav2vec2.named_buffers()), dict(fresh.named_buffers()))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("conv", [True, False])
def test_a_fine_tuned_encoder_learns_in_all_that_the_recipe_does_not_freeze(swapped, folder, tmp_path, recipe, conv):
    brain = swapped.fit(recipe, folder, tmp_path / "save", freeze_wav2vec2_conv=conv)
    assert brain.modes == {True}
    before = PretrainedEncoder(folder).state_dict()
    learned = {name for name, tensor in brain.hparams.wav2vec2.state_dict().items() if not before[name].equal(tensor)}
    parameters = {name for name, _ in brain.hparams.wav2vec2.named_parameters()}
    frozen = {name for name in parameters if conv and name.startswith("model.subsampling.")}
    assert learned == parameters - frozen


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_is_resumed_with_its_encoder_and_the_encoders_optimizer(swapped, folder, tmp_path, recipe, freeze):
    trained = swapped.fit(recipe, folder, tmp_path / "save", freeze_wav2vec2=freeze)
    (checkpoint,) = (tmp_path / "save").glob("CKPT*")
    assert {"wav2vec2.ckpt", "wav2vec2_opt.ckpt"} <= {path.name for path in checkpoint.iterdir()}
    resumed = swapped.fit(recipe, folder, tmp_path / "save", freeze_wav2vec2=freeze)  # its only epoch is done
    assert same(trained.hparams.wav2vec2.state_dict(), resumed.hparams.wav2vec2.state_dict())
    moments = [brain.wav2vec2_optimizer.state_dict()["state"] for brain in (trained, resumed)]
    assert moments[0].keys() == moments[1].keys() and bool(moments[0]) != freeze
    losses = []
    for brain in (trained, resumed):
        torch.manual_seed(1)  # SpeechBrain's pooling adds noise
        losses.append(brain.evaluate(swapped.make_batches(1, seed=1), min_key="loss"))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("freeze", [True, False])
def test_voxcelebs_recipe_gives_waveforms_only(swapped, folder, freeze):
    encoder = PretrainedEncoder(folder, freeze=freeze)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modules = {
        "compute_features": encoder,
        "embedding_model": ECAPA_TDNN(
            encoder.output_dim,
            lin_neurons=8,
            channels=[8] * 5,
            kernel_sizes=[3] * 5,
            dilations=[1] * 5,
            groups=[1] * 5,
            attention_channels=4,
            res2net_scale=2,
            se_channels=4,
        ),
        "classifier": Classifier(8, out_neurons=3),
    }

    class SpeakerBrain(sb.Brain):
        def compute_forward(self, batch, stage):
            wavs, _ = batch
            feats = self.modules.compute_features(wavs)
            return self.modules.classifier(self.modules.embedding_model(feats))

        def compute_objectives(self, predictions, batch, stage):
            return -predictions[:, 0, 0].mean()

    options = {"device": "cpu", "noprogressbar": True}
    brain = SpeakerBrain(modules, lambda parameters: torch.optim.Adam(parameters, 0.01, weight_decay=0.1), {}, options)
    chunks = swapped.ready_loader([(0.1 * torch.randn(2, 8000), torch.ones(2)) for _ in range(2)])
    brain.fit([1], chunks, chunks)
    assert same(before, encoder.state_dict()) == freeze
    assert encoder.training is False  # validation came last


@pytest.mark.parametrize(
    ("options", "wrapped"), [({"freeze_wav2vec2": True}, False), ({"freeze_wav2vec2": False}, True)]
)
def test_two_ranks_train_one_encoder(swapped, folder, tmp_path, options, wrapped):
    one, other = swapped.train_ranks(
        tmp_path / "ranks",
        ("rank_fit", {"recipe": "CTC", "source": str(folder), "save_folder": str(tmp_path / "save"), **options}),
    )
    assert same(one["after"], other["after"])
    assert same(one["before"], one["after"]) != wrapped
    assert one["wrapped"] == ("DistributedDataParallel" if wrapped else "PretrainedEncoder")
    assert bool(one["trained"]) == wrapped
    # a parameter outside the graph would have made the second step wait, and the run fail
    assert all(not torch.equal(one["before"][name], one["after"][name]) for name in one["trained"])


@pytest.mark.parametrize("kind", ["rotary", "relative", "sinusoidal"])
def test_a_long_utterance_on_one_rank_leaves_the_positions_of_all_alone(swapped, tmp_path, kind):
    for number, lengths in enumerate(([[3, 3], [40, 3]], [[40, 3], [3, 3]])):
        calls = ("rank_attend", {"kind": kind, "lengths": lengths})
        assert max(swapped.train_ranks(tmp_path / str(number), calls)) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_checkpoints_and_pretrainer_carry_the_encoder(folder, tmp_path, weighted):
    make = WeightedEncoder if weighted else PretrainedEncoder
    saved, recovered, transferred = make(folder), make(f"random:{folder}"), make(f"random:{folder}")
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(0.1)
    Checkpointer(tmp_path / "save", {"encoder": saved}).save_checkpoint(name="one")
    Checkpointer(tmp_path / "save", {"encoder": recovered}).recover_if_possible()
    pretrainer = Pretrainer(
        loadables={"encoder": transferred}, paths={"encoder": str(tmp_path / "save" / "CKPT+one" / "encoder.ckpt")}
    )
    pretrainer.collect_files()
    pretrainer.load_collected()
    for one in (recovered, transferred):
        assert same(saved.state_dict(), one.state_dict())
