"""Training a head, a mix and an encoder: what is trained, when, at what rate, and what is kept of it."""

import errno
import json
import os
import re
import shutil
import signal
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import LinearScheduler, NewBobScheduler, StepScheduler
from speechbrain.utils.epoch_loop import EpochCounter
from speechbrain.utils.run_opts import RunOptions
from speechbrain.utils.train_logger import FileTrainLogger

from speechbrain_bestrq import task_brain
from speechbrain_bestrq.artefact import save_encoder
from speechbrain_bestrq.checkpointing import AtomicCheckpointer
from speechbrain_bestrq.digests import tensor_digest
from speechbrain_bestrq.downstream import LayerMix
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.feature_cache import cache_features
from speechbrain_bestrq.recipe import GOVERNING, build_hparams
from speechbrain_bestrq.stopping import StoppedError
from speechbrain_bestrq.task_brain import TaskBrain
from speechbrain_bestrq.task_data import TaskBatchSampler, make_dataset, make_task_loader
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.task_settings import check_progress


class LoudnessBrain(TaskBrain):
    """Tells loud from quiet utterances."""

    metric = "error"

    def compute_forward(self, batch, stage):
        """Score the mean frame."""
        batch = batch.to(self.device)
        features, lengths, _ = self.listen(batch, stage)
        self.modes.add((stage.name, self.encoder.encoder.training))
        return self.modules.head(features.sum(1) / lengths[:, None])

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy."""
        targets = torch.tensor([int(loud) for loud in batch.loud])
        self.outcomes += (predictions.argmax(-1) != targets).tolist()
        return torch.nn.functional.cross_entropy(predictions, targets)

    modes = set()

    def start_metrics(self, stage):
        """Forget the outcomes."""
        self.outcomes = []

    def stage_metrics(self, stage):
        """Share of wrong answers."""
        return {"error": float(np.mean(self.outcomes))}


class Stopping(LoudnessBrain):
    """Gets a signal in a batch of training, or at a validation, counted from 1."""

    signals = {}

    def fit_batch(self, batch):
        """Count."""
        self.heard = getattr(self, "heard", 0) + 1
        if self.heard == self.signals.get("batch"):
            os.kill(os.getpid(), self.signals["number"])
        return super().fit_batch(batch)

    def stage_metrics(self, stage):
        """Count."""
        self.validated = getattr(self, "validated", 0) + 1
        if self.validated == self.signals.get("validation"):
            os.kill(os.getpid(), self.signals["number"])
        return super().stage_metrics(stage)


def test_each_seed_rank_epoch_and_batch_draws_dropout_of_its_own(rows, folder, tmp_path, monkeypatch):
    used = []
    for seed, rank in ((3, 0), (3, 1), (4, 0)):
        brain = make_brain(tmp_path / f"{seed}-{rank}", str(folder), seed=seed)
        brain.rank = rank
        listen = LoudnessBrain.compute_forward

        def noting(brain, batch, stage, listen=listen):
            if stage == sb.Stage.TRAIN:
                used.append(torch.initial_seed())
            return listen(brain, batch, stage)

        with monkeypatch.context() as patch:
            patch.setattr(LoudnessBrain, "compute_forward", noting)
            brain.fit(brain.hparams.epoch_counter, *loaders(rows))
    assert len(used) >= 12 and len(set(used)) == len(used)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of 12 utterances of noise, every other one loud."""
    folder = tmp_path_factory.mktemp("audio")
    generator = np.random.default_rng(0)
    rows = {}
    for number in range(12):
        seconds = 0.5 + 0.1 * number
        wave = (0.3 if number % 2 else 0.01) * generator.uniform(-1, 1, round(16000 * seconds))
        soundfile.write(folder / f"{number}.wav", wave, 16000)
        rows[str(number)] = {"wav": str(folder / f"{number}.wav"), "duration": seconds, "loud": number % 2}
    return rows


@pytest.fixture
def folder(make_speech_encoder, tmp_path):
    """An encoder with dropout, of a pre-training that says what it was."""
    encoder = make_speech_encoder(normalize="global", dropout=0.1)
    facts = {"model": "BestRQ", "corpus": "Noise", "step": 7, "audio_hours": 1.5, "device_hours": 0.5}
    return save_encoder(encoder, tmp_path / "encoder", "# Card", **facts)


def loaders(rows, hidden=None):
    """Loaders of training and validation, on the same utterances."""
    dataset = make_dataset(rows, hidden=hidden)
    dataset.set_output_keys(["id", "hidden" if hidden else "sig", "loud"])
    seconds = [row["duration"] for row in rows.values()]
    return [make_task_loader(dataset, TaskBatchSampler(seconds, 4.0, training)) for training in (True, False)]


def make_brain(output, source, epochs=2, all_states=True, mix=True, run_opts=None, encoder=None, **options):
    """A Brain whose weights are a function of the encoder's source."""
    settings = {key: options.pop(key) for key in list(options) if key.startswith("freeze")}
    torch.manual_seed(3)
    encoder = encoder or TaskEncoder(source, all_states=all_states, **{"freeze": True, **settings})
    modules = {"encoder": encoder, "head": torch.nn.Linear(encoder.output_dim, 2)}
    if mix:
        modules["mix"] = LayerMix(encoder.num_states)
    output.mkdir(parents=True, exist_ok=True)
    counter = EpochCounter(epochs)
    hparams = {
        "output_folder": str(output),
        "seed": 3,
        "epoch_counter": counter,
        "train_logger": FileTrainLogger(save_file=str(output / "train_log.txt")),
        "head_optimizer": partial(torch.optim.Adam, lr=1e-2),
        "mix_optimizer": partial(torch.optim.Adam, lr=1e-1),
        "encoder_optimizer": partial(torch.optim.Adam, lr=1e-3),
        **options,
    }
    checkpointer = AtomicCheckpointer(checkpoints_dir=output / "save", recoverables={"counter": counter})
    return LoudnessBrain(modules, hparams, {"device": "cpu", "noprogressbar": True, **(run_opts or {})}, checkpointer)


def fit(brain, rows, hidden=None):
    """Train."""
    brain.modes = set()
    brain.fit(brain.hparams.epoch_counter, *loaders(rows, hidden))
    return brain


def changed(before, module):
    """Names of what is not bit-identical to before."""
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def copied(module):
    """A copy of the state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_frozen_encoder_stays_bit_identical_in_eval_mode_while_mix_and_head_learn(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder)
    before = {name: copied(module) for name, module in brain.modules.items()}
    before_fit = tensor_digest(brain.encoder.state_dict())
    fit(brain, rows)
    assert not changed(before["encoder"], brain.encoder) and tensor_digest(brain.encoder.state_dict()) == before_fit
    assert brain.modes == {("TRAIN", False), ("VALID", False)}
    assert changed(before["mix"], brain.mix) == {"weights"}
    assert changed(before["head"], brain.modules.head) == {"weight", "bias"}
    (checkpoint,) = (tmp_path / "run" / "save").iterdir()
    assert not (checkpoint / "encoder.ckpt").exists()


def test_a_fine_tuned_encoder_changes_and_is_in_the_checkpoint(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder, freeze=False)
    before, before_fit = copied(brain.encoder), tensor_digest(brain.encoder.state_dict())
    fit(brain, rows)
    assert changed(before, brain.encoder) == {name for name, _ in brain.encoder.named_parameters()}
    assert tensor_digest(brain.encoder.state_dict()) != before_fit
    assert ("TRAIN", True) in brain.modes
    assert all((path / "encoder.ckpt").exists() for path in (tmp_path / "run" / "save").iterdir())


def test_the_encoder_rests_until_its_first_update(rows, folder, tmp_path, caplog):
    brain = make_brain(tmp_path / "run", folder, epochs=1, freeze=False)
    before = copied(brain.encoder)
    fit(brain, rows)
    assert changed(before, brain.encoder) == {name for name, _ in brain.encoder.named_parameters()}
    resting = make_brain(tmp_path / "again", folder, epochs=2, freeze=False, encoder_rest=0.5)
    resting.__class__, resting.signals = Stopping, {"validation": 1, "number": signal.SIGTERM}
    with pytest.raises(StoppedError):
        fit(resting, rows)
    assert resting.optimizer_step == brain.optimizer_step and not resting.encoder_updates
    assert not changed(before, resting.encoder)
    assert all(parameter.grad is None for parameter in resting.encoder.parameters())
    again = fit(make_brain(tmp_path / "again", folder, epochs=2, freeze=False, encoder_rest=0.5), rows)
    assert changed(before, again.encoder) == {name for name, _ in again.encoder.named_parameters()}
    again.test(loaders(rows)[1])
    records = again.records()
    assert (records["updates"], records["encoder_updates"]) == (2 * brain.optimizer_step, brain.optimizer_step)

    class Falling(LoudnessBrain):
        """Its first epoch, in which the encoder rests, stays the best."""

        def stage_metrics(self, stage):
            """Error that grows."""
            return {"error": float(self.epoch)}

    worse = make_brain(tmp_path / "worse", folder, epochs=2, freeze=False, encoder_rest=0.5)
    worse.__class__ = Falling
    fit(worse, rows).test(loaders(rows)[1])
    assert worse.encoder_updates == brain.optimizer_step and worse.records()["encoder_updates"] == 0
    assert "the best checkpoint is of epoch 1: its encoder has not been trained." in caplog.text
    frozen = fit(make_brain(tmp_path / "frozen", folder, epochs=1), rows)
    frozen.test(loaders(rows)[1])
    assert frozen.records()["encoder_updates"] == 0


@pytest.mark.parametrize("size", [1, 6])
def test_the_rest_is_as_long_as_it_was_to_be_where_an_epoch_has_other_updates_than_before(rows, folder, tmp_path, size):
    """As on another number of devices."""
    schedule = {"epochs": 4, "freeze": False, "encoder_rest": 0.5}
    broken = make_brain(tmp_path, folder, **schedule)
    broken.__class__, broken.signals = Stopping, {"validation": 1, "number": signal.SIGTERM}
    with pytest.raises(StoppedError):
        fit(broken, rows)
    resumed = make_brain(tmp_path, folder, **schedule)
    training, validation = loaders(rows)
    others = TaskBatchSampler([row["duration"] for row in rows.values()], 100.0, True, max_batch_size=size)
    resumed.fit(resumed.hparams.epoch_counter, make_task_loader(training.dataset, others), validation)
    assert len(others) != broken.optimizer_step
    assert resumed.optimizer_step == broken.optimizer_step + 3 * len(others)
    assert resumed.encoder_updates == 2 * len(others)  # the last two epochs of four


def test_the_encoder_s_rate_rises_and_what_anneals_it_knows_the_full_one(rows, folder, tmp_path):
    used = {"encoder": [], "mix": [], "head": []}

    class Noting(LoudnessBrain):
        """Tells which rates its optimisers take a step with."""

        def init_optimizers(self):
            """Listen to each."""
            super().init_optimizers()
            for part, optimizer in self.optimizers_dict.items():
                rates, group = used[part], optimizer.param_groups[0]
                optimizer.register_step_pre_hook(lambda *_, rates=rates, group=group: rates.append(group["lr"]))

    brain = make_brain(tmp_path / "run", folder, epochs=2, freeze=False, encoder_rest=0.25, encoder_warmup=0.5)
    brain.__class__ = Noting
    fit(brain, rows)
    updates = brain.optimizer_step
    assert updates == 10  # of which the encoder rests in those that begin before a quarter is over
    full = brain.optimizers_dict["encoder"].param_groups[0]["lr"]
    assert used["encoder"] == pytest.approx([full * min((n / 10 - 0.25 + 0.1) / 0.5, 1) for n in range(3, 10)])
    assert brain.encoder_updates == 7
    assert used["head"] == [1e-2] * updates and used["mix"] == [1e-1] * updates
    assert logged(tmp_path / "run")[0].count(f"encoder_rate: {full:.2e}") == 1


def test_the_last_hidden_state_alone_needs_no_mix_and_all_need_one(folder, rows, tmp_path):
    fit(make_brain(tmp_path / "run", folder, all_states=False, mix=False), rows)
    with pytest.raises(ValueError, match="a mix is needed"):
        make_brain(tmp_path / "run", folder, mix=False)


def test_each_part_has_its_own_rate_and_schedule(rows, folder, tmp_path):
    class Falling(LoudnessBrain):
        """Its validation gets worse all the time."""

        def stage_metrics(self, stage):
            """Error that grows."""
            self.calls = getattr(self, "calls", 0) + 1
            return {"error": 1.0 + self.calls}

    brain = make_brain(
        tmp_path / "run",
        folder,
        epochs=3,
        freeze=False,
        head_annealing=NewBobScheduler(1e-2, annealing_factor=0.8),
        mix_annealing=LinearScheduler(1e-1, 1e-2, 3),
        encoder_rest=0.9,  # until the last of the three epochs
        encoder_annealing=NewBobScheduler(1e-3, annealing_factor=0.1),
    )
    brain.__class__ = Falling
    fit(brain, rows)
    rates = {part: optimizer.param_groups[0]["lr"] for part, optimizer in brain.optimizers_dict.items()}
    assert rates["head"] == pytest.approx(1e-2 * 0.8**2)
    assert rates["mix"] == pytest.approx(1e-2)
    assert rates["encoder"] == 1e-3  # it was not trained before


def test_a_schedule_by_the_epoch_goes_on_while_the_encoder_rests(rows, folder, tmp_path):
    annealing = LinearScheduler(1e-3, 1e-4, 4)
    schedule = {"epochs": 4, "freeze": False, "encoder_rest": 0.5, "encoder_annealing": annealing}
    fit(make_brain(tmp_path / "run", folder, **schedule), rows)
    logged_rates = [line.split("encoder_rate: ")[1].split(",")[0] for line in logged(tmp_path / "run")]
    assert logged_rates == [f"{rate:.2e}" for rate in (1e-3, *(annealing(epoch)[1] for epoch in (1, 2, 3)))]


def test_what_is_trained_needs_an_optimizer(folder, tmp_path):
    encoder = TaskEncoder(folder, freeze=False)
    modules = {"encoder": encoder, "mix": LayerMix(3), "head": torch.nn.Linear(16, 2)}
    optimizers = {f"{part}_optimizer": torch.optim.Adam for part in ("head", "mix")}
    with pytest.raises(InputError, match="encoder_optimizer is missing"):
        LoudnessBrain(modules, optimizers, {"device": "cpu"})


def check_rates(folder, annealing, optimizer):
    """Begin a run with these for its head."""
    hparams = {"test_only": False, "head_annealing": annealing, "head_optimizer": optimizer}
    LoudnessBrain.check_run(AtomicCheckpointer(checkpoints_dir=folder), hparams)


@pytest.mark.parametrize("annealing", [NewBobScheduler(2e-4), LinearScheduler(2e-4, 1e-5, 4)])
def test_a_rate_that_would_hold_for_one_epoch_is_refused_before_any_work(tmp_path, annealing):
    adam = torch.optim.Adam
    with pytest.raises(InputError, match="0.01 in head_optimizer and 0.0002 in head_annealing, .* give both the same"):
        check_rates(tmp_path, annealing, partial(adam, lr=1e-2))
    with pytest.raises(InputError, match="0.001 in head_optimizer and 0.0002 in head_annealing"):
        check_rates(tmp_path, annealing, adam)
    check_rates(tmp_path, annealing, partial(adam, lr=2e-4))


@pytest.mark.parametrize("annealing", [StepScheduler(1e-2, half_life=3), LinearScheduler(1e-2, 1e-3, 0), None])
def test_schedules_that_begin_with_the_rate_or_tell_none_are_not_refused(tmp_path, annealing):
    check_rates(tmp_path, annealing, partial(torch.optim.Adam, lr=1e-2))


def test_a_run_of_before_a_setting_got_a_name_or_was_set_free_goes_on(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder, epochs=1)
    brain.settings["num_workers"] = 7  # free today
    fit(brain, rows)
    with pytest.raises(InputError, match="was trained with new_switch False, not True"):
        fit(make_brain(tmp_path / "run", folder, epochs=2, new_switch=True), rows)
    fit(make_brain(tmp_path / "run", folder, epochs=2, new_rate=0.1, new_switch=False), rows)


def logged(output):
    """The lines of a run's log without their clock."""
    return [re.sub(r"train_seconds: \S+", "", line) for line in (output / "train_log.txt").read_text().splitlines()]


def same(run, other, output, other_output):
    """Whether two runs came to the same, bit for bit, and logged the same."""
    assert run.optimizer_step == other.optimizer_step and run.layer_weights == other.layer_weights
    assert logged(output) == logged(other_output)
    for name, module in run.modules.items():
        assert not changed(copied(module), other.modules[name]), name
    return True


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_stopped_after_an_epoch_goes_on_as_if_unbroken(rows, folder, tmp_path, freeze):
    schedule = {"freeze": freeze}
    unbroken = fit(make_brain(tmp_path / "unbroken", folder, epochs=3, **schedule), rows)
    fit(make_brain(tmp_path / "broken", folder, epochs=2, **schedule), rows)
    torch.manual_seed(123)
    resumed = fit(make_brain(tmp_path / "broken", folder, epochs=3, **schedule), rows)
    assert len(resumed.layer_weights) == 3 and resumed.seconds["train"] > 0
    assert same(resumed, unbroken, tmp_path / "broken", tmp_path / "unbroken")


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("when", [{"batch": 2}, {"batch": 8}, {"validation": 1}, {"validation": 3}])
def test_a_signal_ends_it_in_order_and_it_goes_on_as_if_unbroken(rows, folder, tmp_path, freeze, accumulation, when):
    schedule = {"freeze": freeze, "epochs": 3, "run_opts": {"grad_accumulation_factor": accumulation}}
    schedule |= {"encoder_rest": 0.3, "encoder_warmup": 0.4}
    unbroken = fit(make_brain(tmp_path / "unbroken", folder, **schedule), rows)
    assert unbroken.optimizer_step >= 6  # in more batches than updates, if they are accumulated
    broken = make_brain(tmp_path / "broken", folder, **schedule)
    broken.__class__, broken.signals = Stopping, {**when, "number": signal.SIGTERM}
    with pytest.raises(StoppedError, match="by SIGTERM in epoch .*the same command goes on"):
        fit(broken, rows)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    spent = json.loads(next((tmp_path / "broken" / "save").glob("*/progress.ckpt")).read_text())["seconds"]["train"]
    assert spent > 0
    torch.manual_seed(123)
    resumed = fit(make_brain(tmp_path / "broken", folder, **schedule), rows)
    assert resumed.seconds["train"] > spent or "validation" in when
    assert same(resumed, unbroken, tmp_path / "broken", tmp_path / "unbroken")


def test_amid_an_epoch_it_goes_on_on_as_many_devices_only(rows, folder, tmp_path):
    broken = make_brain(tmp_path / "run", folder)
    broken.__class__, broken.signals = Stopping, {"batch": 2, "number": signal.SIGUSR1}
    with pytest.raises(StoppedError):
        fit(broken, rows)
    again = make_brain(tmp_path / "run", folder)
    again.world_size = 2
    with pytest.raises(InputError, match="saved amid an epoch on 1 devices: go on with as many"):
        fit(again, rows)


def test_amid_an_epoch_it_can_be_tested_on_any_number_of_devices(rows, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "mine"])
    broken = make_brain(tmp_path, folder)
    broken.__class__ = Stopping
    broken.signals = {"batch": 2 + len(loaders(rows)[0]), "number": signal.SIGUSR1}  # in the second epoch
    with pytest.raises(StoppedError):
        fit(broken, rows)
    monkeypatch.setattr("sys.argv", ["train.py", "mine", "--test_only"])
    again = make_brain(tmp_path, folder)
    again.world_size = 2
    again.test(loaders(rows)[1])
    assert again.records()["command"] == "python train.py mine"
    assert again.records()["test_command"] == "python train.py mine --test_only"


@pytest.mark.parametrize("again", ["fit", "test"])
def test_a_head_is_not_set_on_another_frozen_encoder_than_it_was_trained_on(rows, folder, tmp_path, again):
    fit(make_brain(tmp_path / "run", folder), rows)
    other = make_brain(tmp_path / "run", f"random:{folder}", epochs=3)
    with pytest.raises(InputError, match="was trained on another encoder than random:") as error:
        fit(other, rows) if again == "fit" else other.test(loaders(rows)[1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("again", ["fit", "test"])
def test_nor_is_a_fine_tuning_begun_with_one_encoder_and_gone_on_with_on_another(rows, folder, tmp_path, again):
    fit(make_brain(tmp_path / "run", folder, freeze=False), rows)
    other = make_brain(tmp_path / "run", f"random:{folder}", epochs=3, freeze=False)
    with pytest.raises(InputError, match="was trained on another encoder than random:"):
        fit(other, rows) if again == "fit" else other.test(loaders(rows)[1])


def test_a_run_does_not_go_on_with_other_settings_or_utterances(rows, folder, tmp_path):
    fit(make_brain(tmp_path / "run", folder, learning_rate=0.1, num_workers=2), rows)
    elsewhere = str(tmp_path / "elsewhere")
    fit(make_brain(tmp_path / "run", folder, epochs=3, learning_rate=0.1, num_workers=0, output_folder=elsewhere), rows)
    other = make_brain(tmp_path / "run", folder, epochs=4, learning_rate=0.2)
    with pytest.raises(InputError, match=r"was trained with learning_rate 0.1, not 0.2: give another") as error:
        fit(other, rows)
    assert "\n" not in str(error.value)
    fewer = {name: row for name, row in rows.items() if name != "3"}
    louder = {name: {**row, "loud": 1} for name, row in rows.items()}
    for changed_rows in (fewer, louder):
        again = make_brain(tmp_path / "run", folder, epochs=4, learning_rate=0.1)
        with pytest.raises(InputError, match="was trained on other utterances or labels"):
            fit(again, changed_rows)
    moved = {name: {**row, "wav": str(shutil.copy(row["wav"], tmp_path))} for name, row in rows.items()}
    fit(make_brain(tmp_path / "run", folder, epochs=4, learning_rate=0.1), moved)


YAML = """
seed: 1
number_of_epochs: 4
output_folder: !ref results/<seed>
head: !name:torch.nn.Linear
    bias: False
    out_features: !ref <seed>
head_annealing: !new:speechbrain.nnet.schedulers.NewBobScheduler
    initial_value: 0.1
"""


def test_settings_are_those_of_the_objects_and_the_run_options_too():
    options = RunOptions.from_dictionary({"grad_accumulation_factor": "8", "noprogressbar": True})
    given = build_hparams(YAML, "seed: 2\nhead: {bias: true}", options)
    assert LoudnessBrain.settings_of(given) == {"seed": 2}
    composed = LoudnessBrain.composed_settings_of(given)
    assert composed.items() >= {"grad_accumulation_factor": 8, "optimizer_step_limit": None}.items()
    annealing = "!new:speechbrain.nnet.schedulers.NewBobScheduler"
    head = {"head": "!name:torch.nn.Linear", "head.bias": True, "head.out_features": "!ref <seed>"}
    assert composed.items() >= {**head, "head_annealing": annealing, "head_annealing.initial_value": 0.1}.items()
    assert not composed.keys() & {"seed", "number_of_epochs", "output_folder", "noprogressbar"}
    other = build_hparams(YAML, "head: !name:torch.nn.Identity {}", options)
    assert [name for name in LoudnessBrain.composed_settings_of(other) if name.startswith("head.")] == []


def test_epochs_may_be_added_unless_the_rates_depend_on_their_number():
    linear = "{initial_value: 0.1, final_value: 0.0, epoch_count: !ref <number_of_epochs>}"
    overrides = f"head_annealing: !new:speechbrain.nnet.schedulers.LinearScheduler {linear}"
    for more, expected in (("", None), (overrides, 4)):
        text = YAML if not more else YAML[: YAML.index("head_annealing")] + more
        composed = LoudnessBrain.composed_settings_of(build_hparams(text, "", RunOptions()))
        assert composed.get("number_of_epochs") == expected


def test_a_run_of_a_version_that_kept_fewer_settings_goes_on(rows, folder, tmp_path, monkeypatch):
    save = LoudnessBrain._save_progress

    def save_less(self, brain, path):
        save(self, brain, path)
        progress = json.loads(Path(path).read_text())
        del progress["composed_settings"]
        Path(path).write_text(json.dumps(progress))

    with monkeypatch.context() as patch:
        patch.setattr(LoudnessBrain, "_save_progress", save_less)
        fit(make_brain(tmp_path / "run", folder), rows)
    again = make_brain(tmp_path / "run", folder, epochs=3, **{GOVERNING: {"grad_accumulation_factor": 1}})
    fit(again, rows)
    changed = make_brain(tmp_path / "run", folder, epochs=4, **{GOVERNING: {"grad_accumulation_factor": 8}})
    with pytest.raises(InputError, match="was trained with grad_accumulation_factor 1, not 8"):
        fit(changed, rows)


def test_an_option_that_no_optimiser_heeds_is_refused(folder, tmp_path):
    options = RunOptions.from_dictionary({"remove_vector_weight_decay": True})
    hparams = {**build_hparams(YAML, "", options), "test_only": False, "speech_encoder": TaskEncoder(folder)}
    with pytest.raises(InputError, match="--remove_vector_weight_decay does nothing"):
        LoudnessBrain.check_run(AtomicCheckpointer(checkpoints_dir=tmp_path), hparams)
    given = RunOptions.from_dictionary({"jit": True})
    with pytest.raises(InputError, match="--jit has no effect here: leave it out"):
        LoudnessBrain.check_run(AtomicCheckpointer(checkpoints_dir=tmp_path), {**hparams, GOVERNING: {}}, given)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("label_hours", "1h", "1h: give a number above 0, or null"),
        ("max_batch_seconds", None, "null: give a number above 0."),
        ("valid_share", "all", "all: give a number above 0."),
        ("chunk_seconds", -3, "-3: give a number above 0, or null"),
        ("number_of_epochs", 1.5, "1.5: give a whole number, 1 at least."),
        ("max_batch_size", 0, "0: give a whole number, 1 at least, or null"),
        ("max_batch_size", float("inf"), "inf: give a whole number, 1 at least, or null"),
        ("train_speakers", True, "True: give a whole number, 1 at least, or null"),
        ("encoder_rest", "half", "half: give a number."),
        ("max_grad_norm", 0, "0: give a number above 0."),
        (GOVERNING, {"max_grad_norm": 0}, "0: give a number above 0."),
    ],
)
def test_a_setting_that_is_no_number_is_named_before_any_work(folder, tmp_path, name, value, advice):
    hparams = {"test_only": False, "speech_encoder": TaskEncoder(folder), "label_hours": None, "max_batch_size": None}
    checkpointer = AtomicCheckpointer(checkpoints_dir=tmp_path)
    LoudnessBrain.check_run(checkpointer, hparams)
    shown = "max_grad_norm" if name == GOVERNING else name
    with pytest.raises(InputError, match=f"--{shown} {advice}"):
        LoudnessBrain.check_run(checkpointer, {**hparams, name: value})


def test_what_may_not_go_on_is_said_before_any_work(rows, folder, tmp_path):
    brain = fit(make_brain(tmp_path / "run", folder, learning_rate=0.1), rows)
    hparams = {"test_only": False, "speech_encoder": brain.encoder, "seed": 3, "learning_rate": 0.1}
    LoudnessBrain.check_run(brain.checkpointer, hparams)
    with pytest.raises(InputError, match="was trained with learning_rate 0.1, not 0.3"):
        LoudnessBrain.check_run(brain.checkpointer, {**hparams, "learning_rate": 0.3})
    with pytest.raises(InputError, match="was trained on another encoder than random:"):
        LoudnessBrain.check_run(brain.checkpointer, {**hparams, "speech_encoder": TaskEncoder(f"random:{folder}")})
    empty = AtomicCheckpointer(checkpoints_dir=tmp_path / "empty")
    LoudnessBrain.check_run(empty, hparams)
    with pytest.raises(InputError, match="empty has no checkpoint to test: train first"):
        LoudnessBrain.check_run(empty, {**hparams, "test_only": True})


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (-0.1, 0.0), (0.0, -0.1), (500, 0)])
def test_an_encoder_that_would_never_be_trained_is_refused_before_any_work(folder, tmp_path, shares):
    brain = make_brain(tmp_path / "run", folder, freeze=False)
    hparams = {"test_only": False, "speech_encoder": brain.encoder, "seed": 3}
    schedule = dict(zip(("encoder_rest", "encoder_warmup"), shares, strict=True))
    with pytest.raises(InputError, match=f"are shares of all updates, together below 1, not {float(shares[0])} and"):
        LoudnessBrain.check_run(brain.checkpointer, {**hparams, **schedule})
    with pytest.raises(InputError, match="valid_interval"):
        LoudnessBrain.check_run(brain.checkpointer, {**hparams, "valid_interval": 0})


def test_shares_of_a_run_may_not_move_by_more_epochs(rows, folder, tmp_path):
    cases = ({}, {"encoder_rest": 0.1}, {"encoder_warmup": 0.1}, {"valid_interval": 2})
    settings = [LoudnessBrain.composed_settings_of({"number_of_epochs": 2, **more}) for more in cases]
    assert settings == [{}, *[{"number_of_epochs": 2}] * 3]


@pytest.mark.parametrize("epochs", [4, 5])
def test_validated_every_other_epoch_and_at_the_end(rows, folder, tmp_path, epochs):

    def schedule():
        annealing = {"mix_annealing": LinearScheduler(1e-1, 1e-2, 5), "head_annealing": NewBobScheduler(1e-2, 0.5, 2.0)}
        return {"epochs": epochs, "freeze": False, "valid_interval": 2, **annealing}

    brain = fit(make_brain(tmp_path / "run", folder, **schedule()), rows)
    lines = logged(tmp_path / "run")
    assert [("valid" in line) for line in lines] == [False, True, False, True, True][:epochs]
    assert all("train loss" in line for line in lines) and len(brain.layer_weights) == epochs
    rates = [float(re.search(r"mix_rate: (\S+?),", line)[1]) for line in lines]
    assert rates == pytest.approx(
        [0.1 - 0.09 * n / 4 for n in range(epochs)], rel=0.01
    )  # by the epoch, validated or not
    brain.test(loaders(rows)[1])
    assert brain.records()["epochs"] == epochs and brain.records()["best_epoch"] in {2, 4, epochs}
    rates = [float(re.search(r"head_rate: (\S+?),", line)[1]) for line in lines]
    # halved, for no gain is enough, at the second validation, after the fourth epoch
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 1e-2, 5e-3][:epochs])
    # stopped within an epoch after one that was not validated
    broken = make_brain(tmp_path / "broken", folder, **schedule())
    updates = brain.optimizer_step // epochs
    broken.__class__, broken.signals = Stopping, {"batch": updates + 2, "number": signal.SIGTERM}
    with pytest.raises(StoppedError):
        fit(broken, rows)
    resumed = fit(make_brain(tmp_path / "broken", folder, **schedule()), rows)
    assert same(resumed, brain, tmp_path / "broken", tmp_path / "run")


def test_killed_it_goes_on_from_an_epoch_that_was_not_validated(rows, folder, tmp_path):
    class Dying(LoudnessBrain):
        """Ends without a word in the fourth epoch."""

        def fit_batch(self, batch):
            """Until then as usual."""
            if self.epoch == 4:
                raise MemoryError
            return super().fit_batch(batch)

    schedule = {"epochs": 5, "freeze": False, "valid_interval": 2, "encoder_rest": 0.3, "encoder_warmup": 0.3}
    unbroken = fit(make_brain(tmp_path / "unbroken", folder, **schedule), rows)
    killed = make_brain(tmp_path / "killed", folder, **schedule)
    killed.__class__ = Dying
    with pytest.raises(MemoryError):
        fit(killed, rows)
    kept = [json.loads((path / "progress.ckpt").read_text())["epochs"] for path in (tmp_path / "killed/save").iterdir()]
    assert sorted(kept) == [2, 3]  # the best of those that were validated, and the last
    resumed = fit(make_brain(tmp_path / "killed", folder, **schedule), rows)
    assert same(resumed, unbroken, tmp_path / "killed", tmp_path / "unbroken")


def test_a_head_is_not_set_on_another_architecture_with_the_same_weights(rows, folder, tmp_path):
    fit(make_brain(tmp_path / "run", folder), rows)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    assert config["encoder"]["num_heads"] == 2
    config["encoder"]["num_heads"] = 4
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="was trained on another encoder than"):
        fit(make_brain(tmp_path / "run", other, epochs=3), rows)
    # what a version wrote that told the weights alone is taken
    (progress,) = (tmp_path / "run" / "save").glob("CKPT*/progress.ckpt")
    known = json.loads(progress.read_text())
    del known["architecture"]
    told = progress.write_text(json.dumps(known))
    checksums = json.loads((progress.parent / "checksums.json").read_text())
    checksums["progress.ckpt"] = [told, zlib.crc32(progress.read_bytes())]
    (progress.parent / "checksums.json").write_text(json.dumps(checksums))
    fit(make_brain(tmp_path / "run", folder, epochs=3), rows)


def test_a_training_without_an_update_is_refused(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder, run_opts={"grad_accumulation_factor": 100})
    with pytest.raises(InputError, match=r"an epoch has \d+ batches, and .* takes .* 100, in 2 epochs: noth"):
        fit(brain, rows)


def test_an_update_of_two_batches_is_a_step_along_the_mean_of_their_gradients(rows, folder, tmp_path, after_forward):
    options = {"grad_accumulation_factor": 2, "max_grad_norm": 1e9}
    sgd = {"head_optimizer": partial(torch.optim.SGD, lr=1.0), "mix_optimizer": partial(torch.optim.SGD, lr=0.0)}
    brain = make_brain(tmp_path / "run", folder, epochs=1, run_opts=options, **sgd)
    head = list(brain.modules.head.parameters())
    before, gradients = [weight.detach().clone() for weight in head], []

    def note(batch, stage, scores):
        if stage == "TRAIN":
            loss = torch.nn.functional.cross_entropy(scores, batch.loud.long())
            gradients.append(torch.autograd.grad(loss, head, retain_graph=True))

    after_forward(LoudnessBrain, note)
    fit(brain, {name: rows[name] for name in list(rows)[:6]})
    assert len(gradients) == 2 and brain.optimizer_step == 1
    for weight, old, one, other in zip(head, before, *gradients, strict=True):
        torch.testing.assert_close(old - weight.detach(), (one + other) / 2)


def test_an_epoch_that_is_done_again_is_in_the_log_once(rows, folder, tmp_path):
    fit(make_brain(tmp_path / "run", folder), rows)
    with open(tmp_path / "run" / "train_log.txt", "a") as file:
        file.write("epoch: 3, killed before its checkpoint\n")
    fit(make_brain(tmp_path / "run", folder, epochs=3), rows)
    assert [line.split(",")[0] for line in logged(tmp_path / "run")] == ["epoch: 1", "epoch: 2", "epoch: 3"]
    assert "killed" not in "".join(logged(tmp_path / "run"))


def test_a_run_that_has_made_its_updates_is_tested_again_and_nothing_else(rows, folder, tmp_path):
    limited = {"epochs": 9, "run_opts": {"optimizer_step_limit": "5"}}
    first = fit(make_brain(tmp_path / "run", folder, **limited), rows)
    before, log = first.modules.head.weight.clone(), logged(tmp_path / "run")
    again = fit(make_brain(tmp_path / "run", folder, **limited), rows)
    assert logged(tmp_path / "run") == log and again.optimizer_step == 5
    assert torch.equal(again.modules.head.weight, before)
    assert again.hparams.epoch_counter.current == first.hparams.epoch_counter.current == len(log)


def test_a_disk_that_takes_no_checkpoint_ends_a_task_in_one_line(rows, folder, tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("speechbrain_bestrq.checkpointing.sync_tree", refuse)
    with pytest.raises(InputError, match="no checkpoint could be saved in .*No space left on device") as refused:
        fit(make_brain(tmp_path / "run", folder), rows)
    assert "\n" not in str(refused.value)


def test_training_on_cached_states_is_training_on_the_audio(rows, folder, tmp_path):
    heard = fit(make_brain(tmp_path / "heard", folder), rows)
    encoder = TaskEncoder(folder)
    cache = cache_features(tmp_path / "cache", encoder, rows)
    cached = fit(make_brain(tmp_path / "cached", folder, encoder=encoder), rows, cache)
    difference = (heard.modules.head.weight - cached.modules.head.weight).abs().max()
    assert difference < 1e-4 * heard.modules.head.weight.abs().max()


def test_a_log_of_each_epoch_and_a_plot_of_the_layer_weights(rows, folder, tmp_path, caplog):
    caplog.set_level("INFO")
    fit(make_brain(tmp_path / "run", folder), rows)
    lines = (tmp_path / "run" / "train_log.txt").read_text().splitlines()
    assert len(lines) == 2 and all("error" in line and "head_rate" in line for line in lines)
    assert sum("layer weights, lowest first" in message for message in caplog.messages) == 2
    assert (tmp_path / "run" / "layer_weights.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_checkpoint_is_tested_and_the_records_are_plain_json(rows, folder, tmp_path):
    brain = fit(make_brain(tmp_path / "run", folder), rows)
    _, test_loader = loaders(rows)
    metrics = brain.test(test_loader)
    best = min(float(json.loads(json.dumps(c.meta["error"]))) for c in brain.checkpointer.list_checkpoints())
    assert metrics["error"] == best and metrics["seconds"] > 0
    records = json.loads(json.dumps(brain.records(1.5), allow_nan=False))
    assert records["feature_seconds"] == 1.5
    assert records["encoder"]["method"] == "BestRQ" and records["encoder"]["updates"] == 7
    assert records["encoder"]["audio_hours"] == 1.5 and records["encoder"]["frozen"] is True
    assert records["trained_parameters"] == 3 + 2 * 17
    assert sum(records["layer_weights"]) == pytest.approx(1.0)
    assert records["device_hours"] == pytest.approx(sum(records["seconds"].values()) / 3600)
    assert "tested_on" not in records


def test_what_was_trained_on_other_devices_is_not_booked_as_trained_on_those_of_the_test(
    rows, folder, tmp_path, monkeypatch
):
    brain = make_brain(tmp_path / "run", folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda *_: None)
        patch.setattr(task_brain, "machine", lambda _: {"device": "another", "threads": 3})
        brain.world_size = 8
        fit(brain, rows)
    again = make_brain(tmp_path / "run", folder)
    again.test(loaders(rows)[1])
    records = again.records()
    assert records["world_size"] == 8 and (records["device"], records["threads"]) == ("another", 3)
    assert records["device_hours"] == pytest.approx(8 * sum(records["seconds"].values()) / 3600)
    assert records["tested_on"] == task_brain.machine("cpu")


def test_the_best_weights_are_tested_but_the_cost_is_that_of_all_epochs(rows, folder, tmp_path, monkeypatch):
    errors = iter([0.1, 0.5, 0.6, 0.3, 0.3])
    monkeypatch.setattr(LoudnessBrain, "stage_metrics", lambda self, stage: {"error": next(errors)})
    brain = fit(make_brain(tmp_path / "run", folder, epochs=3), rows)
    seconds, shares, updates = dict(brain.seconds), list(brain.layer_weights), brain.optimizer_step
    brain.test(loaders(rows)[1])
    for one in (brain, make_brain(tmp_path / "run", folder, epochs=3)):
        if one is not brain:  # a process of its own, which only tests
            one.test(loaders(rows)[1])
        records = one.records()
        assert records["best_epoch"] == 1 and records["epochs"] == 3 and records["updates"] == updates
        assert records["seconds"] == pytest.approx(seconds, rel=0.5) and records["seconds"]["train"] > 0
        assert records["layer_weights"] == shares[0] != shares[2]


def test_nothing_is_tested_that_was_not_trained(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder)
    with pytest.raises(InputError, match="no checkpoint to test"):
        brain.test(loaders(rows)[1])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_it_trains_in_the_precision_that_is_asked_for(rows, folder, tmp_path, after_forward, precision):
    lowered = set()

    def note(_, stage, scores):
        lowered.add((stage, torch.is_autocast_enabled("cpu"), scores.dtype))

    after_forward(LoudnessBrain, note)
    options = {"precision": precision, "eval_precision": precision}
    brain = make_brain(tmp_path / "run", folder, freeze=False, run_opts=options)
    before = copied(brain.modules.head)
    fit(brain, rows)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert lowered == {(stage, precision == "bf16", dtype) for stage in ("TRAIN", "VALID")}
    assert changed(before, brain.modules.head)
    assert all(torch.isfinite(value).all() for value in brain.encoder.state_dict().values())


def test_the_rates_may_go_by_another_metric_than_the_checkpoint(rows, folder, tmp_path, monkeypatch):
    # the error stands still, as with a recogniser that says nothing yet, while the loss falls
    monkeypatch.setattr(LoudnessBrain, "stage_metrics", lambda brain, stage: {"error": 1.0})
    rates = {}
    for metric in ("error", "loss"):
        annealing = NewBobScheduler(1e-2, annealing_factor=0.5)
        options = {"annealing_metric": metric, "head_annealing": annealing, "epochs": 4}
        brain = fit(make_brain(tmp_path / metric, folder, **options), rows)
        rates[metric] = brain.optimizers_dict["head"].param_groups[0]["lr"]
    assert rates["error"] < rates["loss"] == 1e-2


class Plain(LoudnessBrain):
    """Reads nothing back itself."""

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy."""
        if stage != sb.Stage.TRAIN:
            return super().compute_objectives(predictions, batch, stage)
        return torch.nn.functional.cross_entropy(predictions, batch.loud.long())

    def fit_batch(self, batch):
        """Watch."""
        with self.watch() as waits:
            loss = super().fit_batch(batch)
        assert waits.operations > 10 and waits.found == []
        return loss


@pytest.mark.parametrize("freeze", [True, False])
def test_a_step_waits_for_nothing_and_the_log_has_the_mean_loss_all_the_same(
    rows, folder, tmp_path, monkeypatch, freeze, toy
):
    losses = []
    # others read their own count of updates, which is on the host
    fused = {f"{part}_optimizer": partial(torch.optim.Adam, lr=1e-3, fused=True) for part in ("encoder", "mix", "head")}
    brain = make_brain(tmp_path / "run", folder, epochs=1, freeze=freeze, run_opts={"max_grad_norm": 1.0}, **fused)
    brain.__class__, brain.watch = Plain, toy.Waits
    after = TaskBrain.on_fit_batch_end
    monkeypatch.setattr(
        TaskBrain, "on_fit_batch_end", lambda self, *all: losses.append(all[2].detach()) or after(self, *all)
    )
    monkeypatch.setattr(task_brain, "READ_EVERY", 2)
    fit(brain, rows)
    assert len(losses) >= 3
    told = re.search(r"train loss: (\S+)", (tmp_path / "run" / "train_log.txt").read_text())[1]
    assert float(told) == pytest.approx(float(torch.stack(losses).mean()), rel=5e-3)


def test_a_validation_has_the_mean_loss_of_its_batches(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder, epochs=1, head_optimizer=partial(torch.optim.Adam, lr=0.0))
    seen, evaluate_batch = [], LoudnessBrain.evaluate_batch
    brain.evaluate_batch = lambda *all, **named: seen.append(evaluate_batch(brain, *all, **named)) or seen[-1]
    fit(brain, rows)
    told = re.search(r"valid loss: ([^ ,]+)", (tmp_path / "run" / "train_log.txt").read_text())[1]
    assert len(seen) >= 3 and float(max(seen)) != float(min(seen))
    assert float(told) == pytest.approx(float(torch.stack(seen).mean()), rel=5e-3)


def test_losses_that_are_not_finite_end_the_training(rows, folder, tmp_path, monkeypatch):
    brain = make_brain(tmp_path / "run", folder, epochs=1, run_opts={"nonfinite_patience": 1})
    objectives = LoudnessBrain.compute_objectives

    def spoilt(self, predictions, batch, stage):
        return objectives(self, predictions, batch, stage) * (float("nan") if stage == sb.Stage.TRAIN else 1.0)

    monkeypatch.setattr(LoudnessBrain, "compute_objectives", spoilt)
    with pytest.raises(InputError, match=r"the loss of \d batches of epoch 1 was not finite: lower the learning rates"):
        fit(brain, rows)
    assert not list((tmp_path / "run" / "save").glob("CKPT*"))


@pytest.mark.parametrize(
    ("spoilt_stage", "message"),
    [
        (sb.Stage.TRAIN, "no batch of epoch 2 was finite"),
        (sb.Stage.VALID, "epoch 2 on the validation set is no number"),
    ],
)
def test_a_model_that_is_lost_within_patience_does_not_take_the_best_ones_place(
    spoilt_stage, message, rows, folder, tmp_path, monkeypatch
):
    fit(make_brain(tmp_path / "run", folder, epochs=1), rows)
    before = sorted(path.name for path in (tmp_path / "run" / "save").glob("CKPT*"))
    objectives = LoudnessBrain.compute_objectives

    def spoilt(self, predictions, batch, stage):
        return objectives(self, predictions, batch, stage) * (float("nan") if stage == spoilt_stage else 1.0)

    monkeypatch.setattr(LoudnessBrain, "compute_objectives", spoilt)
    again = make_brain(tmp_path / "run", folder, epochs=2, run_opts={"nonfinite_patience": 100})
    with pytest.raises(InputError, match=f"{message}: lower the learning rates"):
        fit(again, rows)
    assert sorted(path.name for path in (tmp_path / "run" / "save").glob("CKPT*")) == before


def test_what_a_run_was_trained_on_is_told_when_it_is_tested_on_something_else(rows, folder, tmp_path):
    brain = make_brain(tmp_path / "run", folder, epochs=1)
    brain.data = {"trained_corpus": "Noise", "label_hours": 0.5}
    fit(brain, rows)
    again = make_brain(tmp_path / "run", folder, epochs=1)
    again.data = {"trained_corpus": "Other noise", "label_hours": 9.0}
    again.test(loaders(rows)[1])
    records = again.records()
    assert (records["trained_corpus"], records["label_hours"]) == ("Noise", 0.5)


def test_what_is_dropped_is_dropped_in_training_only(rows, folder, tmp_path):
    heard = {"drop_freq": [], "drop_chunk": []}

    class Noted(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, wavs, *lengths):
            heard[self.name].append((wavs.dtype, len(lengths)))
            return wavs

    options = {name: Noted(name) for name in heard}
    fit(make_brain(tmp_path, folder, epochs=1, run_opts={"precision": "bf16"}, **options), rows)
    batches = len(loaders(rows)[0])
    assert heard == {"drop_freq": batches * [(torch.float32, 0)], "drop_chunk": batches * [(torch.float32, 1)]}


def test_a_folder_of_another_kind_of_run_is_refused(folder, tmp_path):
    checkpointer = AtomicCheckpointer(checkpoints_dir=tmp_path / "save", recoverables={"head": torch.nn.Linear(1, 1)})
    checkpointer.save_checkpoint()
    with pytest.raises(InputError, match="is of a run of another kind: give another --output_folder"):
        TaskBrain.check_run(checkpointer, {"test_only": False})


def test_speed_perturbation_is_heard_in_training_only(rows, folder, tmp_path):
    class Recorder(torch.nn.Module):
        def forward(self, wavs):
            self.calls = getattr(self, "calls", 0) + 1
            # where the waveforms are, and in float32
            assert self.device == wavs.device and not torch.is_autocast_enabled("cpu")
            return wavs[:, ::2]

    recorder = Recorder()
    options = {"epochs": 1, "speed_perturb": recorder, "run_opts": {"precision": "bf16"}}
    brain = fit(make_brain(tmp_path / "run", folder, **options), rows)
    assert recorder.calls == len(loaders(rows)[0]) and Path(brain.hparams.output_folder).is_dir()


def test_filter_banks_are_a_source_like_any_other(rows, tmp_path):
    brain = fit(make_brain(tmp_path / "run", "fbank", epochs=8, all_states=False, mix=False), rows)
    assert brain.encoder.describe() == {"source": "fbank", "parameters": 0, "method": "fbank"}
    assert set(brain.parts) == {"head"}
    with pytest.raises(InputError, match="no weights to fine-tune"):
        TaskEncoder("fbank", freeze=False)
    with pytest.raises(InputError, match="filter banks have no output_rate"):
        TaskEncoder("fbank", output_rate=50, freeze_layers=0, output_norm=False)


def test_a_switch_that_an_older_run_did_not_have_was_off():
    progress = {"encoder": "e", "settings": {"seed": 1}}
    check_progress(progress, "save", {"seed": 1, "utterance_norm": False}, {}, {"encoder": "e"}, "source", set())
    with pytest.raises(InputError, match="trained with utterance_norm False, not True"):
        check_progress(progress, "save", {"seed": 1, "utterance_norm": True}, {}, {"encoder": "e"}, "source", set())
    with pytest.raises(InputError, match="trained with seed 1, a setting that this YAML does not have"):
        check_progress(progress, "save", {}, {}, {"encoder": "e"}, "source", set())
    check_progress(progress, "save", {}, {}, {"encoder": "e"}, "source", set(), goes_on=False)  # a test of it
    # a fine-tuning of before shares and masks
    old = {"encoder": "e", "settings": {"encoder_start_update": 500}, "composed_settings": {"head.dropout": 0.1}}
    new = {"head.dropout": 0.1, "number_of_epochs": 20, "speech_encoder.apply_spec_augment": "!ref <masks>"}
    settings = {"encoder_rest": 0.1, "masks": False}
    check_progress(old, "save", settings, new, {"encoder": "e"}, "source", set(), goes_on=False)
    with pytest.raises(InputError, match="trained with head.dropout 0.1, not 0.2"):
        known = {"encoder": "e"}, "source", set()
        check_progress(old, "save", settings, {**new, "head.dropout": 0.2}, *known, goes_on=False)
    check_progress({**progress, "composed_settings": {}}, "save", {"seed": 1}, {"number_of_epochs": 5}, *known)
