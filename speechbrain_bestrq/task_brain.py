"""What the downstream tasks share: encoder, mix and head, each with its own optimiser, their cost, their records."""

import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.nnet.schedulers import NewBobScheduler, update_learning_rate
from speechbrain.utils.checkpoints import Checkpointer
from speechbrain.utils.distributed import ddp_broadcast, if_main_process
from torch import Tensor, nn
from torch.utils.data import DataLoader

from speechbrain_bestrq.allocator import give_back_now_and_then
from speechbrain_bestrq.downstream import LayerMix, draw_layer_weights
from speechbrain_bestrq.encoder_schedule import EncoderSchedule, lowered
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.frontend import absolute_lengths
from speechbrain_bestrq.precision import full_precision
from speechbrain_bestrq.ranks import check_ranks_agree, rank_and_size
from speechbrain_bestrq.recipe import GOVERNING, command_line
from speechbrain_bestrq.results import machine
from speechbrain_bestrq.run_options import OF_TASKS, check_run_options, whole_number
from speechbrain_bestrq.running_loss import RunningLoss
from speechbrain_bestrq.seeding import derive_seed
from speechbrain_bestrq.stopping import Request, Requests, StoppedError
from speechbrain_bestrq.task_encoders import TaskEncoder
from speechbrain_bestrq.task_settings import (
    EPOCHS,
    check_first_rate,
    check_numbers,
    check_progress,
    plain_values,
    utterance_digest,
)

logger = logging.getLogger(__name__)

LAYER_WEIGHTS_PLOT = "layer_weights.png"

#: Batches after which the mean loss is read back, for the progress bar and to see whether it is finite.
READ_EVERY = 20

NOTHING_TRAINED = "{} has no checkpoint to test: train first, without --test_only."


class TaskBrain(sb.Brain):
    """Trains a head, and with it the mix of an encoder's layers and the encoder, on labelled speech.

    A task's Brain has ``compute_forward`` (which begins with :meth:`listen`),
    ``compute_objectives``, and :meth:`stage_metrics`, whose entry :attr:`metric` chooses the
    checkpoint and drives the learning rates.

    A signal that asks to stop ends the training after the update, with a checkpoint. From whichever checkpoint a run
    goes on, it does as if it had not been stopped: what is drawn in a batch is a function of seed, epoch, batch and
    rank.

    Of hparams it reads

    - ``encoder_optimizer``, ``mix_optimizer``, ``head_optimizer``: take parameters
      (``!name:torch.optim.Adam``); needed for what is trained. Modules besides the encoder and the mix
      count to the head;
    - ``encoder_annealing``...: SpeechBrain's ``NewBobScheduler``, which goes by the metric, or a schedule that
      goes by the epoch, such as ``LinearScheduler``; the rate stays where there is none;
    - ``annealing_metric``: what NewBob goes by, if not :attr:`metric`;
    - ``encoder_rest``, ``encoder_warmup``: shares of all updates, 0 if left out
      (:class:`~speechbrain_bestrq.encoder_schedule.EncoderSchedule`). An encoder that rests runs without gradients,
      in train mode: with its dropout and SpecAugment, as it will when it is trained;
    - ``valid_interval``: epochs from validation to validation, 1 if left out; the last one is validated anyway.
      Between, nothing is chosen or annealed by a metric;
    - ``speed_perturb``, ``drop_freq``, ``drop_chunk``: applied to the waveforms in training, those that are there;
    - ``output_folder``, ``train_logger`` (a ``FileTrainLogger``), ``epoch_counter``, ``seed``.

    Arguments
    ---------
    modules : dict
        "encoder" (a :class:`~speechbrain_bestrq.task_encoders.TaskEncoder`), "head", and
        where the encoder gives several hidden states "mix" (a
        :class:`~speechbrain_bestrq.downstream.LayerMix`).
    hparams, run_opts, checkpointer
        As for ``speechbrain.Brain``. The Brain adds what it trains to the checkpointer.

    Raises
    ------
    InputError
        If there is nothing to train something with.
    """

    #: Of the validation: the lower the better.
    metric = "loss"

    #: What may change before a run goes on; a task's Brain adds its own. The encoder is compared by what it is.
    free_settings = frozenset(
        "cache_features cache_folder data_folder encoder eval_precision fold_folder max_eval_batch_seconds "
        "max_unreadable num_workers number_of_epochs output_folder save_folder test_only".split()
    )

    def __init__(
        self,
        modules: dict[str, nn.Module],
        hparams: dict[str, Any],
        run_opts: Any = None,
        checkpointer: Any = None,
    ):
        self.encoder: TaskEncoder = modules["encoder"]
        self.mix: LayerMix | None = modules.get("mix")
        if self.mix is None and self.encoder.num_states > 1:
            raise ValueError(f"the encoder gives {self.encoder.num_states} hidden states: a mix is needed.")
        self.parts = _optimized_parts(modules)
        for part in self.parts:
            if f"{part}_optimizer" not in hparams:
                raise InputError(f"{part}_optimizer is missing from the YAML, but the {part} is to be trained: add it.")
        super().__init__(modules, None, hparams, run_opts, checkpointer)
        self.requests = Requests()  # heeds signals within fit only
        self.rank, self.world_size = rank_and_size()
        self.seconds = {"train": 0.0, "validation": 0.0}
        self.device_seconds = 0.0  # of both, of all devices; a run may go on on another number of them
        self.layer_weights: list[list[float]] = []
        self.encoder_schedule = _encoder_schedule(hparams)
        self.encoder_updates = self._batches = 0  # those that trained the encoder; heard by this process
        self.epoch, self._last_epoch, self._epoch_updates, self._updates_limit = 1, 1, 1, None
        self.trained_parameters = sum(weight.numel() for weights in self.parts.values() for weight in weights)
        self.settings, self.composed_settings = self.settings_of(hparams), self.composed_settings_of(hparams)
        if self.optimizer_step_limit is not None:
            # arrives as text
            self.optimizer_step_limit = whole_number("optimizer_step_limit", self.optimizer_step_limit)
        self._begun_with = self.encoder.identity()
        self._trains_on: str | None = None
        self._sums_before: list[float] | None = None
        self.data: dict[str, Any] = {}
        """What the results say of the labelled speech that is trained on; of a test, of that which was."""
        if checkpointer is not None:
            # before the modules: those trained on another encoder may not fit, or fit and be of no use
            checkpointer.add_recoverable("progress", self, self._load_progress, self._save_progress)
            for name, module in modules.items():
                if any(parameter.requires_grad for parameter in module.parameters()):
                    checkpointer.add_recoverable(name, module)
            for part in self.parts:
                if isinstance(self._annealing(part), NewBobScheduler):  # others are functions of the epoch
                    checkpointer.add_recoverable(f"{part}_annealing", self._annealing(part))

    @classmethod
    def settings_of(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        """Give the plain values of a YAML that govern what is trained, and may not change before a run goes on.

        Arguments
        ---------
        hparams : dict
            Of the YAML.

        Returns
        -------
        dict
            By their keys.
        """
        return plain_values({name: value for name, value in hparams.items() if name not in cls.free_settings})

    @classmethod
    def composed_settings_of(cls, hparams: dict[str, Any]) -> dict[str, Any]:
        """Give what else may not change before a run goes on.

        Arguments
        ---------
        hparams : dict
            Of :func:`speechbrain_bestrq.recipe.build_hparams`.

        Returns
        -------
        dict
            What the YAML's objects are made with, by a path such as "head.dropout"; SpeechBrain's run options; and the
            number of epochs, where the rates of each depend on it.
        """
        composed = dict(hparams.get(GOVERNING, {}))
        annealings = [value for name, value in hparams.items() if name.endswith("_annealing")]
        by_epoch = not all(isinstance(one, NewBobScheduler) for one in annealings)
        by_share = hparams.get("encoder_rest") or hparams.get("encoder_warmup")
        # the last epoch is validated whatever its number: what anneals by a metric sees one more
        at_intervals = int(hparams.get("valid_interval", 1)) > 1
        if (by_epoch or by_share or at_intervals) and EPOCHS in hparams:
            composed[EPOCHS] = hparams[EPOCHS]
        return plain_values(composed)

    @classmethod
    def check_run(cls, checkpointer: Checkpointer, hparams: dict[str, Any], run_opts: Any = None) -> None:
        """Refuse to go on from a checkpoint of other settings, or to test what was not trained, before any work.

        Arguments
        ---------
        checkpointer : Checkpointer
            Of the run.
        hparams : dict
            Of the YAML: with "test_only" and "speech_encoder".
        run_opts : RunOptions, optional
            SpeechBrain's, of the command line.

        Raises
        ------
        InputError
            Naming what differs, an option that the task's optimisers do not heed, or a schedule that is none; or if an
            optimiser of a run that begins and its annealing begin with other rates.
        """
        if run_opts is not None:
            check_run_options(run_opts, OF_TASKS)
        check_numbers({**hparams.get(GOVERNING, {}), **hparams})
        if hparams.get(GOVERNING, {}).get("remove_vector_weight_decay"):
            raise InputError(
                "--remove_vector_weight_decay does nothing to the optimisers of this recipe: leave it out."
            )
        _encoder_schedule(hparams)
        whole_number("valid_interval", hparams.get("valid_interval", 1))
        newest = checkpointer.find_checkpoint()
        if newest is None:
            if hparams["test_only"]:
                raise InputError(NOTHING_TRAINED.format(checkpointer.checkpoints_dir))
            for part in ("encoder", "mix", "head"):  # of a run that began so nothing can be changed any more
                check_first_rate(part, hparams.get(f"{part}_optimizer"), hparams.get(f"{part}_annealing"))
            return
        if "progress" not in newest.paramfiles:
            raise InputError(f"{newest.path} is of a run of another kind: give another --output_folder.")
        encoder: TaskEncoder = hparams["speech_encoder"]
        progress = json.loads(Path(newest.paramfiles["progress"]).read_text(encoding="utf-8"))
        settings = cls.settings_of(hparams), cls.composed_settings_of(hparams)
        known = encoder.identity(), encoder.source, cls.free_settings
        check_progress(progress, newest.path, *settings, *known, goes_on=not hparams["test_only"])

    # ---------------------------------------------------------------- computing

    def listen(self, batch: Any, stage: sb.Stage) -> tuple[Tensor, Tensor, Tensor]:
        """Bring a batch to the device, encode it and mix its hidden states.

        Arguments
        ---------
        batch : PaddedBatch
            On the host; with ``sig``, waveforms, or ``hidden``, cached hidden states
            (B, T, S, D).
        stage : sb.Stage
            The encoder is trained in TRAIN only.

        Returns
        -------
        features : Tensor
            Shape (B, T, D); zero in the padding.
        lengths : Tensor
            Frames of each utterance, int64, shape (B,).
        host_lengths : Tensor
            The same on the host, for what would wait for them there.
        """
        if self.device_type == "cpu":
            self._batches += 1
            give_back_now_and_then(self._batches)
        is_cached = hasattr(batch, "hidden")
        host_relative = (batch.hidden if is_cached else batch.sig).lengths.cpu()
        batch = batch.to(self.device, non_blocking=True)
        if is_cached:
            states, relative = batch.hidden
            hidden, lengths = states.permute(2, 0, 1, 3), absolute_lengths(relative, states.shape[1])
            host_lengths = absolute_lengths(host_relative, states.shape[1])
        else:
            wavs, wav_lens = batch.sig
            if stage == sb.Stage.TRAIN:
                wavs = self._augment(wavs, wav_lens)
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._encoder_is_trained()):
                hidden, lengths = self.modules.encoder(wavs, wav_lens)
            host_lengths = self.encoder.num_frames(absolute_lengths(host_relative, wavs.shape[1]))
        return (hidden[0] if self.mix is None else self.modules.mix(hidden, lengths)), lengths, host_lengths

    def _augment(self, wavs: Tensor, wav_lens: Tensor) -> Tensor:
        """Change waveforms where they are, and without autocast whatever precision the training has."""
        with full_precision(wavs.device.type):
            if (perturb := getattr(self.hparams, "speed_perturb", None)) is not None:
                perturb.device = wavs.device  # SpeechBrain's goes to the CPU for it, and back
                wavs = perturb(wavs)
            if (drop_freq := getattr(self.hparams, "drop_freq", None)) is not None:
                wavs = drop_freq(wavs)
            if (drop_chunk := getattr(self.hparams, "drop_chunk", None)) is not None:
                wavs = drop_chunk(wavs, wav_lens)
        return wavs

    def _encoder_is_trained(self) -> bool:
        return not self.encoder.freeze and self._encoder_share() > 0

    def _encoder_share(self) -> float:
        """The part of its rate at which the encoder is trained in the update that the present batch belongs to."""
        if self._updates_limit is not None:  # which ends the run
            return self.encoder_schedule.share(self.optimizer_step / self._updates_limit, 1 / self._updates_limit)
        update = max(self.step - 1, 0) // self.grad_accumulation_factor
        run = self._last_epoch * self._epoch_updates
        return self.encoder_schedule.share(((self.epoch - 1) * self._epoch_updates + update) / run, 1 / run)

    # ---------------------------------------------------------------- optimisers

    def init_optimizers(self) -> None:
        """Make an optimiser for each part that is trained."""
        self.optimizers_dict = {}
        for part, parameters in self.parts.items():
            optimizer = getattr(self.hparams, f"{part}_optimizer")(parameters)
            self.optimizers_dict[part] = optimizer
            if self.checkpointer is not None:
                self.checkpointer.add_recoverable(f"{part}_optimizer", optimizer)

    def freeze_optimizers(self, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, torch.optim.Optimizer]:
        """Leave out the encoder's until it is trained."""
        return {part: one for part, one in optimizers.items() if part != "encoder" or self._encoder_is_trained()}

    def optimizers_step(self) -> None:
        """Update the weights, the encoder's at the part of its rate that its schedule says."""
        self.encoder_updates += self._encoder_is_trained()
        with lowered(self.optimizers_dict.get("encoder"), self._encoder_share()):
            super().optimizers_step()

    def _annealing(self, part: str) -> Any:
        return getattr(self.hparams, f"{part}_annealing", None)

    def _anneal(self, epoch: int, value: float | None) -> dict[str, float]:
        """Set the rates of the next epoch; return those of this one. What goes by a metric needs one."""
        rates = {}
        for part, optimizer in self.optimizers_dict.items():
            rates[f"{part}_rate"] = optimizer.param_groups[0]["lr"]
            annealing = self._annealing(part)
            if annealing is None:
                continue
            by_metric = isinstance(annealing, NewBobScheduler)
            # an encoder that is not trained yet is not to blame for a metric that stands still
            if by_metric and (value is None or (part == "encoder" and not self.encoder_updates)):
                continue
            _, rate = annealing(value if by_metric else epoch)
            update_learning_rate(optimizer, rate)
        return rates

    # ---------------------------------------------------------------- updates

    def fit_batch(self, batch: Any) -> Tensor:
        """Train on a batch as SpeechBrain does, but without waiting for the device to see whether the loss is finite.

        Raises
        ------
        InputError
            Some batches later, if the loss of more than ``nonfinite_patience`` batches of the epoch was not.
        """
        should_step = self.step % self.grad_accumulation_factor == 0
        self.on_fit_batch_start(batch, should_step)
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            self.scaler.scale(loss / self.grad_accumulation_factor).backward()
        if should_step:
            self.optimizers_step()
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        self._running_loss.add(loss.detach())
        if self.step % READ_EVERY == 0:
            self._running_loss.read_late()
        return self._running_loss.mean

    def update_average(self, loss: Tensor, avg_loss: float) -> float:
        """Give the mean loss of the epoch as far as it has been read; of other stages, the mean of the batches."""
        if self._stage == sb.Stage.TRAIN:
            return float(loss)
        # SpeechBrain leaves out what is not finite: a lost model would have the loss of what is left, or 0
        return super().update_average(loss, avg_loss) if math.isfinite(float(loss)) else math.nan

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Make dropout and augmentation of a batch the same, whatever was drawn before."""
        torch.manual_seed(derive_seed(self.hparams.seed, self.rank, self.train_sampler.epoch, self.step))

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        """Between updates only; a run that was asked to stop does."""
        if self.step % self.grad_accumulation_factor:
            return False
        self._stop_if_asked(saved=False)
        due = super()._should_save_intra_epoch_ckpt(last_ckpt_time, steps_since_ckpt)
        if due:
            self._running_loss.read()
        return due

    def _stop_if_asked(self, saved: bool) -> None:
        """End the run in order if a rank was asked to."""
        if self.requests.agreed() != Request.STOP:
            return
        if not saved and self.checkpointer is not None:
            self._running_loss.read()
            self.checkpointer.save_and_keep_only(meta={"epoch": self.epoch}, end_of_epoch=False, min_keys=[self.metric])
        raise StoppedError(
            f"by {self.requests.signal or 'a signal to another rank'} in epoch {self.epoch}, after update "
            f"{self.optimizer_step}; the same command goes on."
        )

    # ---------------------------------------------------------------- stages

    def fit(self, epoch_counter: Any, train_set: DataLoader, valid_set: DataLoader) -> None:
        """Train; go on from the last checkpoint if there is one.

        Arguments
        ---------
        epoch_counter : EpochCounter
            Counts the epochs.
        train_set, valid_set : DataLoader
            Of :func:`speechbrain_bestrq.task_data.make_task_loader`.
        """
        self.train_sampler = train_set.batch_sampler  # on one device too, each epoch has batches of its own
        self._trains_on = utterance_digest(train_set.dataset.data)
        self._last_epoch, self._epoch_updates = epoch_counter.limit, len(train_set) // self.grad_accumulation_factor
        updates = self._last_epoch * self._epoch_updates
        self._updates_limit = self.optimizer_step_limit if (self.optimizer_step_limit or updates) < updates else None
        if not updates:
            raise InputError(
                f"an epoch has {len(train_set)} batches, and an update takes grad_accumulation_factor "
                f"{self.grad_accumulation_factor}, in {epoch_counter.limit} epochs: nothing would be trained. Give a "
                "lower one, smaller batches, or more epochs."
            )
        self.valid_interval = whole_number("valid_interval", getattr(self.hparams, "valid_interval", 1))
        with self.requests:
            super().fit(self._epochs_left(epoch_counter), train_set, valid_set)
            self._stop_if_asked(saved=True)  # another rank was, in the last validation
        if self.layer_weights and if_main_process():
            draw_layer_weights(self.layer_weights, Path(self.hparams.output_folder) / LAYER_WEIGHTS_PLOT)

    def _fit_valid(self, valid_set: DataLoader, epoch: int, enable: bool) -> None:
        """Validate, if the epoch's turn has come; else log what it was trained to."""
        is_last = epoch == self._last_epoch or self._optimizer_step_limit_exceeded or self.debug
        if is_last or epoch % self.valid_interval == 0:
            super()._fit_valid(valid_set, epoch, enable)
        else:
            self._log_epoch(epoch, {})
            if self.checkpointer is not None:  # beside the best of those that were validated
                self.checkpointer.save_and_keep_only(meta={"epoch": epoch}, min_keys=[self.metric])
            self._stop_if_asked(saved=True)

    def _epochs_left(self, epoch_counter: Any) -> Iterator[int]:
        """The epochs; none where a checkpoint, which is loaded by then, is of the last update at the end of one."""
        if self.step or not self._optimizer_step_limit_exceeded:
            yield from epoch_counter

    def on_fit_start(self) -> None:
        """Load the newest checkpoint; take the epochs that it has not seen the end of out of the log."""
        super().on_fit_start()
        check_ranks_agree(resumed_after_update=self.optimizer_step)  # a shared folder may show them other states
        log = Path(self.hparams.train_logger.save_file)
        if if_main_process() and log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            done = self.hparams.epoch_counter.current
            numbers = [re.match(r"epoch: (\d+)", line) for line in lines]
            kept = [
                line for line, number in zip(lines, numbers, strict=True) if number is None or int(number[1]) <= done
            ]
            log.write_text("".join(kept), encoding="utf-8")

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Start the clock and the metrics."""
        self._started, self._stage = time.perf_counter(), stage
        if stage == sb.Stage.TRAIN:
            self.epoch, self.train_sampler.start = epoch, self.step  # an epoch that was begun goes on
            self._running_loss = RunningLoss(epoch, self.nonfinite_patience, self.device, self._sums_before)
            self._sums_before = None
        self.start_metrics(stage)

    def start_metrics(self, stage: sb.Stage) -> None:
        """Forget what was collected; a task's Brain may start its collectors here."""

    def stage_metrics(self, stage: sb.Stage) -> dict[str, float]:
        """Give what was collected in VALID or TEST, on the whole set; with the entry :attr:`metric`."""
        return {}

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Log; after a validation set the rates and save."""
        elapsed = time.perf_counter() - self._started
        if stage == sb.Stage.TRAIN:
            self._book("train", elapsed)
            self._running_loss.read()
            self._train_loss = float(self._running_loss.mean)
            self._stage = sb.Stage.VALID  # a checkpoint from here on is of the epoch's end, validated or not
            return
        # one answer for all ranks: rates that part would let the weights part
        metrics = ddp_broadcast({"loss": float(stage_loss), **self.stage_metrics(stage)}, src=0)
        if stage == sb.Stage.TEST:
            self.test_metrics = metrics
            return
        self._book("validation", elapsed)
        if unknown := [name for name in ("loss", self.metric) if math.isnan(metrics[name])]:
            # before it takes the place of the best checkpoint
            raise InputError(
                f"the {unknown[0]} of epoch {epoch} on the validation set is no number: lower the learning rates, or "
                "train in fp32, and begin anew."
            )
        self._log_epoch(epoch, metrics)
        if self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(meta={"epoch": epoch, **metrics}, min_keys=[self.metric])
        self._stop_if_asked(saved=True)

    def _log_epoch(self, epoch: int, metrics: dict[str, float]) -> None:
        """Log an epoch, validated or not, and set the rates of the next."""
        rates = self._anneal(epoch, metrics.get(getattr(self.hparams, "annealing_metric", self.metric)))
        meta = {"epoch": epoch, "updates": self.optimizer_step, **rates, "train_seconds": self.seconds["train"]}
        self.hparams.train_logger.log_stats(meta, {"loss": self._train_loss}, metrics or None)
        if self.mix is not None:
            self.layer_weights.append(self.mix.shares())
            logger.info("epoch %d: %s", epoch, self.mix.describe())

    def _book(self, stage: str, elapsed: float) -> None:
        self.seconds[stage] += elapsed
        self.device_seconds += elapsed * self.world_size

    def _save_progress(self, _brain: Any, path: Path) -> None:
        if if_main_process():
            begun = time.perf_counter() - self._started if self._stage == sb.Stage.TRAIN else 0.0
            progress = {
                "seconds": {**self.seconds, "train": self.seconds["train"] + begun},
                "device_seconds": self.device_seconds + begun * self.world_size,
                "machine": machine(self.device),
                "command": command_line(),
                "step": self.step,
                "train_sums": self._running_loss.state() if self._stage == sb.Stage.TRAIN else None,
                "world_size": self.world_size,
                "layer_weights": self.layer_weights,
                "epochs": self.hparams.epoch_counter.current - (self._stage == sb.Stage.TRAIN),
                "updates": self.optimizer_step,
                "encoder_updates": self.encoder_updates,
                "settings": self.settings,
                "composed_settings": self.composed_settings,
                **self._begun_with,
                "trains_on": self._trains_on,
                "data": self.data,
            }
            Path(path).write_text(json.dumps(progress), encoding="utf-8")

    def _load_progress(self, _brain: Any, path: Path, end_of_epoch: bool) -> None:
        progress = json.loads(Path(path).read_text(encoding="utf-8"))
        settings = self.settings, self.composed_settings
        goes_on = self._trains_on is not None  # a test takes the weights alone
        check_progress(
            progress, Path(path).parent, *settings, self._begun_with, self.encoder.source, self.free_settings, goes_on
        )
        if self._trains_on is not None and progress["trains_on"] != self._trains_on:
            raise InputError(
                f"the checkpoint in {Path(path).parent} was trained on other utterances or labels: give another "
                "--output_folder."
            )
        if goes_on and progress["step"] and progress["world_size"] != self.world_size:
            raise InputError(
                f"the checkpoint in {Path(path).parent} was saved amid an epoch on {progress['world_size']} devices: "
                f"go on with as many, or give another --output_folder."
            )
        self.seconds, self.layer_weights = progress["seconds"], progress["layer_weights"]
        self.encoder_updates, self.device_seconds = progress["encoder_updates"], progress["device_seconds"]
        self._sums_before = progress["train_sums"]
        if not goes_on:
            self.data = progress["data"]

    # ---------------------------------------------------------------- evaluation

    def on_evaluate_start(self, max_key: str | None = None, min_key: str | None = None) -> None:
        """Load the best checkpoint.

        Raises
        ------
        InputError
            If there is none: nothing was trained.
        """
        if self.checkpointer.find_checkpoint(min_key=self.metric) is None:
            raise InputError(NOTHING_TRAINED.format(self.checkpointer.checkpoints_dir))
        super().on_evaluate_start(min_key=self.metric)
        # the weights are the best epoch's; what the run has cost is what the last one knew
        newest = self.checkpointer.find_checkpoint()
        self._load_progress(self, newest.paramfiles["progress"], True)

    def test(self, loader: DataLoader) -> dict[str, float]:
        """Evaluate the best checkpoint on a set.

        Arguments
        ---------
        loader : DataLoader
            Of the set.

        Returns
        -------
        dict
            The metrics of the stage, and "seconds".
        """
        started = time.perf_counter()
        self.evaluate(loader)
        return {**self.test_metrics, "seconds": time.perf_counter() - started}

    def records(self, feature_seconds: float | None = None) -> dict[str, Any]:
        """Give what ``results.json`` says of the run itself, to be called after the tests.

        Arguments
        ---------
        feature_seconds : float, optional
            What computing a cache of hidden states took, for this run or another that shares it.

        Returns
        -------
        dict
            Plain JSON values, with those of :attr:`data`. "encoder_updates" are those that trained the encoder which
            was tested; "device_hours" those of training and validation; the machine that is named is the last that
            trained, and so is the command; "tested_on" says on which other one the tests were made, if that is so, and
            "test_command" by which, if they were made later.
        """
        best = self.checkpointer.find_checkpoint(min_key=self.metric)
        newest = self.checkpointer.find_checkpoint()
        trained, tested = (
            json.loads(Path(one.paramfiles["progress"]).read_text(encoding="utf-8")) for one in (newest, best)
        )
        if not self.encoder.freeze and tested["encoder_updates"] == 0:
            logger.warning("the best checkpoint is of epoch %d: its encoder has not been trained.", best.meta["epoch"])
        here = machine(self.device)
        there = trained["machine"]
        return {
            **self.data,
            "encoder": {
                **self.encoder.describe(),
                "frozen": self.encoder.freeze,
                "digest": self.encoder.identity()["encoder"],
            },
            "seed": self.hparams.seed,
            "settings": self.settings,
            "epochs": trained["epochs"],
            "updates": trained["updates"],
            "encoder_updates": tested["encoder_updates"],
            "best_epoch": best.meta["epoch"],
            "validation": {name: best.meta[name] for name in best.meta.keys() & {"loss", *self.test_metrics}},
            "trained_parameters": self.trained_parameters,
            "layer_weights": None if self.mix is None else self.mix.shares(),
            "seconds": dict(self.seconds),
            "feature_seconds": feature_seconds,
            "device_hours": self.device_seconds / 3600,
            "world_size": trained["world_size"],
            "command": trained["command"],
            **there,
            **({} if command_line() == trained["command"] else {"test_command": command_line()}),
            **({} if here == there else {"tested_on": here}),
        }


def _encoder_schedule(hparams: Mapping[str, Any]) -> EncoderSchedule:
    """The one that a YAML asks for, without rest and rise where it says nothing."""
    return EncoderSchedule(*(float(hparams.get(name, 0.0)) for name in ("encoder_rest", "encoder_warmup")))


def check_metrics(hparams: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Refuse what no validation gives to choose the checkpoint by, or to drive the learning rates.

    Arguments
    ---------
    hparams : mapping
        Of the YAML.
    metrics : sequence of str
        What a validation gives.

    Raises
    ------
    InputError
        If ``valid_metric`` or ``annealing_metric`` is something else.

    Example
    -------
    >>> check_metrics({"valid_metric": "cer"}, ("wer", "cer", "loss"))
    """
    for key in ("valid_metric", "annealing_metric"):
        if hparams.get(key, metrics[0]) not in metrics:
            raise InputError(f"{key} is one of {', '.join(metrics)}, not {hparams[key]!r}.")


def _optimized_parts(modules: dict[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each optimiser: encoder, mix, and all else as the head."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, module in modules.items():
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if trainable:
            parts.setdefault(name if name in ("encoder", "mix") else "head", []).extend(trainable)
    return parts
