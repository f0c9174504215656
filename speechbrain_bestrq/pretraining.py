"""The Brain of pre-training: BEST-RQ and whatever else has its model's interface."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import Checkpoint, ckpt_recency
from speechbrain.utils.distributed import ddp_barrier, ddp_broadcast, if_main_process
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from speechbrain_bestrq.accounting import datasheet_flops
from speechbrain_bestrq.checkpointing import SaveError
from speechbrain_bestrq.codebook_use import log_codebook_use
from speechbrain_bestrq.digests import tensor_digest
from speechbrain_bestrq.encoder_folders import EncoderFolders
from speechbrain_bestrq.errors import InputError
from speechbrain_bestrq.machine import device_name, package_versions, peak_memory_gb
from speechbrain_bestrq.model_card import write_card
from speechbrain_bestrq.pretraining_data import PretrainingBatch
from speechbrain_bestrq.pretraining_model import PretrainingModel, PretrainingOutput
from speechbrain_bestrq.progress_log import ProgressLog
from speechbrain_bestrq.ranks import check_ranks_agree, rank_and_size
from speechbrain_bestrq.resuming import check_optimizer, check_resumable, load_state, save_state, warn_of_changes
from speechbrain_bestrq.run_log import RUN_FILE, validation_error
from speechbrain_bestrq.run_options import whole_number
from speechbrain_bestrq.stopping import Request, Requests, StoppedError
from speechbrain_bestrq.tally import Tally
from speechbrain_bestrq.training_account import TrainingAccount
from speechbrain_bestrq.update_guard import UpdateGuard
from speechbrain_bestrq.windows import samples_per_frame
from speechbrain_bestrq.writing import write_text

logger = logging.getLogger(__name__)

#: Times that a run goes back to its last checkpoint, each time with half the learning rate, before it is given up.
MOST_REWINDS = 4


class PretrainingBrain(sb.Brain):
    """Trains a pre-training model, on one device or several.

    The model is ``modules["model"]``, a
    :class:`~speechbrain_bestrq.pretraining_model.PretrainingModel`.

    * The gradient of an update is that of the mean loss over all masked frames of all
      its micro-batches on all ranks: each micro-batch adds the *sum* of its losses,
      and the total is divided by the total number of masked frames.
    * A batch carries its mask and the seeds of its noise and its dropout, which are
      functions of (seed, rank, epoch, batch): a resumed run repeats nothing and needs
      no generator's state.
    * The finite check is made on the device, on the norm of the gradients that all
      ranks share: an update that is not finite is skipped by all alike, and counted.
    * Nothing is read back from the device but the log line, late.
    * A signal (SIGTERM, SIGUSR1, Ctrl-C) ends the run after the update, with a
      checkpoint and :class:`~speechbrain_bestrq.stopping.StoppedError`.

    Arguments
    ---------
    modules, opt_class, hparams, run_opts, checkpointer
        As for :class:`speechbrain.Brain`. ``opt_class`` makes a fused optimizer.
        Of ``hparams``: ``lr_schedule``, ``output_folder``, ``log_interval`` (updates),
        ``optimizer_step_limit``, ``encoder_at_steps``, ``seed``. Where they are there:
        ``valid_interval`` (updates; a run is validated at its end, too, and without it after each epoch);
        ``spike_ratio``: updates whose gradient norm is this many times the usual are skipped too;
        ``max_skipped_updates`` (50) in a row, after which ``on_nonfinite`` "stop"s the run or
        "rewind"s it to the last checkpoint with half the rate; ``max_unsaved_hours`` (2) that it
        trains on when the disk takes no checkpoint.
    run_facts : dict
        What run.json and the encoder's card tell of the data (corpus, hours...).
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        opt_class: Any,
        hparams: dict[str, Any],
        run_opts: Any,
        checkpointer: Any,
        run_facts: dict[str, Any],
    ):
        super().__init__(modules, opt_class, hparams, run_opts, checkpointer)
        if self.optimizer_step_limit is not None:
            # a run option without a default arrives as text
            self.optimizer_step_limit = whole_number("optimizer_step_limit", self.optimizer_step_limit)
        self.model: PretrainingModel = self.modules["model"]
        self.rank, self.world_size = rank_and_size()
        self.run_facts = {**run_facts, **self._machine_facts(), "chosen_by": self.model.chosen_by}
        self.folder = Path(self.hparams.output_folder)
        self.log = ProgressLog(self.folder)
        self.generator = torch.Generator(device=self.device)
        self.best_error, self.withheld, self.validation_due = math.inf, False, False
        self.valid_interval: int | None = getattr(self.hparams, "valid_interval", None)
        self.has_validated = False  # in this process
        self.last_epoch = float("inf")
        self.last_saved_at: float | None = None  # by SpeechBrain's clock
        self.rate_scale, self.rewinds, self.unsaved_since = 1.0, 0, None
        self.saved_update = self.valid_set = None
        self.encoders = EncoderFolders(self.folder)
        self.requests = Requests()  # heeds signals within fit only
        self.guard = UpdateGuard(self.device, getattr(self.hparams, "spike_ratio", 0.0))
        # a micro-batch of this many masked frames weighs 1, so that summed losses keep their scale in fp16
        self.nominal_targets = 1000.0
        self.tally = Tally(self.model, self.device)  # of an update
        self.account = TrainingAccount(self.tally, self.world_size, self.device)
        self.clock, self.shown_loss = self.account.clock, torch.zeros(())
        if checkpointer is not None:
            checkpointer.add_recoverable("progress", self, self._load_progress, self._save_progress)

    def _machine_facts(self) -> dict[str, Any]:
        sample_rate = self.model.speech_encoder.frontend.sample_rate
        return {
            "model": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "sample_rate": sample_rate,
            # of the encoder, in the long run
            "frames_per_second": sample_rate / samples_per_frame(self.model.speech_encoder),
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "world_size": self.world_size,
            "updates_planned": self.optimizer_step_limit,
            "seed": self.hparams.seed,
            "versions": package_versions(),
        }

    def _valid_content(self) -> str | None:
        """Tell the audio of the validation from other, by its lengths; None before there is any."""
        return None if self.valid_set is None else self.valid_set.batch_sampler.content()

    # ---------------------------------------------------------------- start

    def measure(self, batches: Any) -> None:
        """Set the model's statistics of the training audio, check the codebook's use; a resumed run has both behind it.

        Arguments
        ---------
        batches : callable
            Returns a list of (wavs, wav_lens); called on the main process only, at the
            start of a new run only.
        """
        check_ranks_agree(model=self.model.signature())
        # the main process decides: others may see an older state of a shared folder
        resumed = self.checkpointer is not None and self.checkpointer.find_checkpoint() is not None
        if ddp_broadcast(resumed, src=0):
            return
        if if_main_process():
            try:
                audio = batches()
                self.model.measure(audio)
            except ValueError as error:
                raise InputError(f"statistics of the training audio: {error}") from error
            log_codebook_use(self.model, audio)
        if self.world_size > 1:
            for tensor in self.model.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
            # loading what one holds lets the modules notice their statistics
            self.model.load_state_dict(self.model.state_dict())

    def fit(self, epoch_counter: Any, train_set: DataLoader, valid_set: DataLoader) -> None:
        """Train; see :meth:`speechbrain.Brain.fit`.

        Arguments
        ---------
        epoch_counter : iterable
            Counts epochs; a recoverable of the checkpointer.
        train_set : DataLoader
            Over a :class:`~speechbrain_bestrq.batching.LadderBatchSampler`.
        valid_set : DataLoader
            Over a :class:`~speechbrain_bestrq.batching.PaddedBatchSampler`.
        """
        self.sampler, self.valid_set = train_set.batch_sampler, valid_set
        self.last_epoch = getattr(epoch_counter, "limit", self.last_epoch)
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("sampler", self.sampler, load_state, save_state)
            # the main process decides: others may see an older state of a shared folder
            newest = ddp_broadcast(self.checkpointer.find_checkpoint() if if_main_process() else None, src=0)
            planned = self.optimizer_step_limit or float("inf")
            if newest is not None and newest.meta["step"] >= planned and not newest.meta.get("validation_due"):
                logger.info("This run is done: %s holds update %d.", newest.path, newest.meta["step"])
                self._write_missing_encoder(newest)
                return
        self._check_ranks_agree()
        with self.requests:
            while True:
                try:
                    # the progress bar is our own: it reads nothing back from the device
                    super().fit(epoch_counter, train_set, valid_set, progressbar=False)
                    break
                except _RewindError:
                    self._prepare_rewind()
        self._write_log_lines(wait=True)
        self.log.close()
        if self.unsaved_since or self.encoders.owed:
            raise InputError(
                f"the run ended after update {self.optimizer_step}, but its last updates could not be saved: make room "
                f"in {self.folder}, and start again."
            )

    def _check_ranks_agree(self) -> None:
        """Refuse to train with ranks that are not alike."""
        buffers = {name for name, _ in self.model.named_buffers()}
        check_ranks_agree(
            model=self.model.signature(),
            # without those that are no part of a checkpoint
            buffers=tensor_digest({name: one for name, one in self.model.state_dict().items() if name in buffers}),
            training=self.sampler.state_dict(),
            validation=self.valid_set.batch_sampler.fingerprint(),
            precision=self.precision,
            seed=self.hparams.seed,
            updates=(self.grad_accumulation_factor, self.optimizer_step_limit),
        )

    def on_fit_start(self) -> None:
        """Refuse a foreign checkpoint, else load the newest; open the logs."""
        check_resumable(self.checkpointer, self.model, self.sampler)
        super().on_fit_start()
        to_come = [step for step in self.hparams.encoder_at_steps if step > self.optimizer_step]
        self.encoders.check_places(["encoder", *(f"encoder@{step}" for step in to_come)])
        check_ranks_agree(resumed_after_update=self.optimizer_step)
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            raise InputError("optimizer: give it fused: True; only fused optimizers skip an update on the device.")
        self.optimizer_parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if if_main_process():
            path = self.folder / RUN_FILE
            if self.optimizer_step:
                warn_of_changes(path, self.run_facts)
            write_text(path, json.dumps(self.run_facts, indent=2) + "\n")
        show_bar = not self.noprogressbar
        self.log.open(self.optimizer_step, self.optimizer_step_limit, show_bar, validation_comes=self.validation_due)
        ddp_barrier()
        self.account.begin()

    def init_optimizers(self) -> None:
        """Make the optimizer; refuse other settings than those that the run was trained with."""
        super().init_optimizers()
        check_optimizer(self.optimizer, self.checkpointer)

    def _compile(self) -> None:
        """Compile each encoder layer by itself, in place: one small graph for each shape of the ladder."""
        if not self.compile:
            return
        allow_many_shapes()
        dynamic = bool(self.compile_using_dynamic_shape_tracing)
        for layer in self.model.speech_encoder.encoder.layers:
            layer.compile(mode=self.compile_mode, fullgraph=self.compile_using_fullgraph, dynamic=dynamic)

    def _wrap_distributed(self) -> None:
        """One module, one DDP. Every rank makes the same buffers itself: none is sent at each step."""
        if self.world_size > 1:
            devices = [torch.device(self.device)] if self.device_type == "cuda" else None
            self.modules["model"] = DistributedDataParallel(
                self.model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    # ---------------------------------------------------------------- a step

    def compute_forward(self, batch: PretrainingBatch, stage: sb.Stage) -> PretrainingOutput:
        """Call the model with the batch's own mask and noise."""
        # validation calls the bare model: its ranks may have unequal numbers of batches
        model = self.modules["model"] if stage == sb.Stage.TRAIN else self.model
        self.generator.manual_seed(batch.noise_seed)
        return model(batch.wavs, batch.wav_lens, mask=batch.masked, generator=self.generator)

    def compute_objectives(self, predictions: PretrainingOutput, batch: PretrainingBatch, stage: sb.Stage) -> Tensor:
        """Return the mean loss over the batch's masked frames."""
        return predictions.loss

    def fit_batch(self, batch: PretrainingBatch) -> Tensor:
        """Add a micro-batch's gradient; update after the last of ``grad_accumulation_factor`` or of the epoch."""
        self.clock.batch_came()
        last = self.step % self.grad_accumulation_factor == 0 or self.step == len(self.sampler)
        self.on_fit_batch_start(batch, last)
        batch = batch.to(self.device)
        torch.manual_seed(batch.dropout_seed)
        self.model.start_update(self.optimizer_step + 1)
        with self.no_sync(not last):
            with self.training_ctx:
                output = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(output, batch, sb.Stage.TRAIN)
            self.scaler.scale(loss * (output.num_targets / self.nominal_targets)).backward()
        self.tally.add(output, batch.seconds)
        if last:
            self.optimizers_step()
        self.sampler.position = self.step
        self.clock.flops += self.model.flops(*output.shape, output.num_targets)
        self.on_fit_batch_end(batch, output, loss, last)
        self.clock.ask_for_batch()
        return self.shown_loss

    @torch.no_grad()
    def optimizers_step(self) -> None:
        """Scale the gradients to the mean over all targets, clip them, update if they are finite."""
        update = self.optimizer_step + 1
        rate = self.hparams.lr_schedule(update) * self.rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = self.tally.sums
        if self.world_size > 1:
            torch.distributed.all_reduce(sums)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.optimizer_parameters if p.grad is not None]
        # DDP has divided by the ranks
        scale = (self.world_size * self.nominal_targets / sums[0].clamp(min=1)).float()
        norm = torch.nn.utils.get_total_norm(gradients) * scale
        if self.max_grad_norm > 0:
            scale = scale * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        good = self.guard.judge(norm, update)
        # what GradScaler does for fused optimizers: the kernel itself skips the update. The norm is not finite
        # where a gradient is not
        self.optimizer.found_inf = (~good).float()
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
            # it halves without end: at 0, gradients would never be finite again
            self.scaler._scale.clamp_(min=1.0)
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer_step = update
        self.account.add_update(sums, good, norm)
        self.tally.begin_update()

    def on_fit_batch_end(
        self, batch: PretrainingBatch, outputs: PretrainingOutput, loss: Tensor, should_step: bool
    ) -> None:
        """After an update: the log line, the progress bar, the encoder of this step."""
        if not should_step:
            return
        self.clock.updates += 1
        if self.optimizer_step % self.hparams.log_interval == 0:
            self._submit_log_line()
        self._write_log_lines(wait=False)
        self.log.advance()
        if self.optimizer_step in self.hparams.encoder_at_steps:
            self._save_encoder(f"encoder@{self.optimizer_step}")
        if self.valid_interval and self.optimizer_step % self.valid_interval == 0 and not self._validation_is_next:
            self._validate_between_updates()
        self._heed_requests()

    def _heed_requests(self, validating: bool = False) -> None:
        """End the run, or go back to the last checkpoint, if a rank was asked to."""
        asked = self.requests.agreed()
        if asked == Request.REWIND:
            raise _RewindError
        # a run that has done its updates ends by itself, when it is validated
        if asked != Request.STOP or (self._optimizer_step_limit_exceeded and not validating):
            return
        if validating:
            self.validation_due = True
        self._save_checkpoint(end_of_epoch=False, stopping=True)
        where = "no checkpoint" if self.unsaved_since or not self.checkpointer else "a checkpoint"
        signal = self.requests.signal or "a signal to another rank"
        raise StoppedError(
            f"by {signal} after update {self.optimizer_step}, with {where} of it; the same command goes on."
        )

    def _prepare_rewind(self) -> None:
        """Make ready to load the last checkpoint again and to go on from it with half the rate."""
        self._delete_doubtful_checkpoints()
        self.rewinds += 1
        self.rate_scale /= 2
        self.withheld = False
        self.encoders.forget()  # they are of updates after that checkpoint, which come again
        self.account.go_back()
        logger.warning(
            "Going back to the last checkpoint, for the %d. time of at most %d, with %g of the learning rate.",
            self.rewinds,
            MOST_REWINDS,
            self.rate_scale,
        )

    def _delete_doubtful_checkpoints(self) -> None:
        """Delete those that were saved in a row of skipped updates, as a run stopped, if there are others."""

        def is_doubtful(checkpoint: Checkpoint) -> bool:
            return checkpoint.meta.get("amid_skips", False)

        # the main process decides: others may see an older state of a shared folder
        others = if_main_process() and any(not is_doubtful(one) for one in self.checkpointer.find_checkpoints())
        if ddp_broadcast(others, src=0):
            self.checkpointer.delete_checkpoints(
                num_to_keep=0, importance_keys=(ckpt_recency,), ckpt_predicate=is_doubtful, verbosity=logging.WARNING
            )

    @property
    def _validation_is_next(self) -> bool:
        """Whether the run is over, or an epoch of one that is validated after each."""
        epoch_is_over = self.sampler.position == len(self.sampler)
        validated = not self.valid_interval or self.sampler.epoch >= self.last_epoch
        return self._optimizer_step_limit_exceeded or (epoch_is_over and validated)

    def _fit_valid(self, valid_set: DataLoader, epoch: int, enable: bool) -> None:
        """Validate at the end of an epoch, where that is wanted: an epoch of little audio is over soon."""
        if self._validation_is_next:
            self._validate(epoch)

    def _validate_between_updates(self) -> None:
        step = self.step
        self._validate(self.sampler.epoch)
        self.step = step
        self.modules.train()
        self.account.start_clock()
        self._heed_requests()  # what came in the validation

    def _validate(self, epoch: int) -> None:
        """Validate; for the first time with a checkpoint before, for what is wrong with the set shows then."""
        if not self.has_validated and self.saved_update != self.optimizer_step:
            self.validation_due = True
            self._save_checkpoint(end_of_epoch=False)
            self.validation_due = False
        super()._fit_valid(self.valid_set, epoch, enable=False)
        self.has_validated = True

    # ---------------------------------------------------------------- logging

    def _submit_log_line(self) -> None:
        """Start reading back what has happened since the last line; a collective of all ranks."""
        peak = datasheet_flops(self.run_facts["device"], self.precision)
        left = max((self.optimizer_step_limit or self.optimizer_step) - self.optimizer_step, 0)
        known = {
            "event": "train",
            "step": self.optimizer_step,
            "epoch": self.sampler.epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "peak_memory_gb": peak_memory_gb(self.device),
            "rewinds": self.rewinds,
        }
        rows = {"skipped_row": self.guard.skipped_row, "longest_skipped_row": self.guard.longest_row}
        self.guard.start_row()
        self.account.submit(known, left, peak, rows)

    def _write_log_lines(self, wait: bool) -> None:
        """Write the lines whose values have arrived."""
        for entry in self.account.ready(wait):
            skipped, longest = int(entry.pop("skipped_row")), int(entry.pop("longest_skipped_row"))
            if entry["mask_ratio"] == 0 and skipped:  # all updates of this line were skipped: no loss
                without = ("loss", *self.model.loss_terms, "accuracy", "gain", "mask_ratio")
                entry |= {name: float("nan") for name in without if name in entry}
            self.shown_loss = torch.tensor(entry["loss"])
            self.log.write(entry)
            if longest >= getattr(self.hparams, "max_skipped_updates", 50):
                self._give_up_or_rewind(entry["step"], longest)

    def _give_up_or_rewind(self, step: int, skipped: int) -> None:
        """Ask all ranks to go back to the last checkpoint, if the YAML wants it and it may still help."""
        rewind = getattr(self.hparams, "on_nonfinite", "stop") == "rewind"
        has_checkpoint = self.checkpointer is not None and self.checkpointer.find_checkpoint() is not None
        if rewind and has_checkpoint and self.rewinds < MOST_REWINDS:
            self.requests.ask(Request.REWIND)
            return
        raise InputError(
            f"{skipped} updates in a row, of those up to {step}, had no finite, ordinary gradients: "
            "lower the learning rate or lengthen the warm-up, train in bf16 or fp32, and start again to resume."
        )

    # ---------------------------------------------------------------- stages

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        """Set the sampler to its epoch; start the sums of a validation."""
        if stage == sb.Stage.TRAIN:
            self.sampler.set_epoch(epoch)
            self.step = self.sampler.position  # an epoch that was begun goes on
            self.account.start_clock()
            if self.validation_due:  # it was broken off; at the end of an epoch it comes by itself
                self.validation_due = False
                if not self._validation_is_next:
                    self._validate_between_updates()
        else:
            self.model.start_update(max(self.optimizer_step, 1))  # may come before the first update of this process
            self.stage_started = time.perf_counter()
            self.validation = Tally(self.model, self.device)
            if self.tally.histogram is not None:  # a rank may have no batch of its own
                self.validation.histogram = torch.zeros_like(self.tally.histogram)
            # so many have all ranks; what is asked for in the others is heeded after the validation
            self.valid_batches, self.shared_valid_batches = 0, self.valid_set.batch_sampler.shared_batches

    @torch.no_grad()
    def evaluate_batch(self, batch: PretrainingBatch, stage: sb.Stage) -> Tensor:
        """Add a batch to the sums of the validation."""
        self.valid_batches += 1
        if self.valid_batches <= self.shared_valid_batches:
            self._heed_requests(validating=True)
        batch = batch.to(self.device)
        # padded batches have shapes without number: not worth compiling
        with self.evaluation_ctx, torch.compiler.set_stance("force_eager"):
            output = self.compute_forward(batch, stage)
        self.validation.add(output, batch.seconds)
        return torch.zeros(())

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        """After training: the log lines. After validation: its line, the checkpoint, the best encoder."""
        if stage == sb.Stage.TRAIN:
            self._write_log_lines(wait=True)
            return
        if self.world_size > 1:
            torch.distributed.all_reduce(self.validation.sums)
        averages = self.validation.averages(self.validation.sums, self.world_size)
        values = {name: float(value) for name, value in averages.items()}
        entry = {"event": "valid", "step": self.optimizer_step, "epoch": epoch, **values}
        entry |= {"audio_hours": self.account.audio_hours, "device_hours": self.account.device_hours}
        entry |= {"seconds": time.perf_counter() - self.stage_started}
        self.log.write(entry)
        # before the checkpoint, which says that it is written
        error = validation_error(values, self.model.chosen_by)
        if error < self.best_error:
            self._save_encoder("encoder", entry)
            self.best_error = error
        # a loss that is no number has no place in their order
        meta = {self._error_name: error} if math.isfinite(error) else {}
        meta["valid_set"] = self._valid_content()
        # a run that ends amid an epoch can be continued there
        self._save_checkpoint(end_of_epoch=self.sampler.position == len(self.sampler), **meta)

    # ---------------------------------------------------------------- saving

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time: float, steps_since_ckpt: int) -> bool:
        """Between updates only: every ``ckpt_interval_steps`` updates, or after ``ckpt_interval_minutes``.

        Time is looked at with the log lines, so that ranks talk no more often than that.
        """
        if self.checkpointer is None:
            return False
        between_updates = self.step % self.grad_accumulation_factor == 0 or self.step == len(self.sampler)
        if not between_updates or self._validation_is_next:  # which saves anyway, when it is done
            return False
        if self.saved_update == self.optimizer_step:  # one amid the epoch has just been done
            return False
        if (self.unsaved_since or self.withheld) and self.clock.updates == 0:  # try again with each log line
            return True
        if self.clock.updates and self.ckpt_interval_minutes > 0:
            return False
        if self.ckpt_interval_steps > 0:
            return self.optimizer_step % self.ckpt_interval_steps == 0
        if self.last_saved_at is None:  # SpeechBrain forgets it at the end of an epoch
            self.last_saved_at = last_ckpt_time
        return super()._should_save_intra_epoch_ckpt(self.last_saved_at, steps_since_ckpt)

    def _save_intra_epoch_ckpt(self) -> None:
        self._save_checkpoint(end_of_epoch=False)

    def _save_checkpoint(self, end_of_epoch: bool, stopping: bool = False, **meta: Any) -> None:
        """Save; keep the newest and the best."""
        if self.checkpointer is None:
            return
        self._write_log_lines(wait=True)  # a resumed run logs nothing of before its checkpoint
        # in a row of skipped updates the weights may be beyond help, which a rewind must not go back to
        amid_skips = bool(self.guard.skipped_row)
        self.withheld = amid_skips and not (stopping or self._optimizer_step_limit_exceeded)
        if self.withheld:
            return
        signature = json.dumps(self.model.signature(), sort_keys=True)
        self.shared_histogram = self.tally.shared_histogram(self.world_size)
        meta |= {"step": self.optimizer_step, "signature": signature, "validation_due": self.validation_due}
        meta["amid_skips"] = amid_skips
        with self.clock.saving():
            try:
                self.encoders.write_owed()
                self.checkpointer.save_checkpoint(meta=meta, end_of_epoch=end_of_epoch)
            except SaveError as error:
                self._train_on_unsaved(error)
                return
            self.unsaved_since, self.saved_update, self.last_saved_at = None, self.optimizer_step, None
            # two of the newest, for one may be damaged, and the best of those validated on the same audio
            here = self._valid_content()
            self.checkpointer.keep_newest_and_best(
                2, self._error_name, comparable=lambda checkpoint: checkpoint.meta.get("valid_set", here) == here
            )

    def _train_on_unsaved(self, error: SaveError) -> None:
        """Say that a checkpoint could not be saved; give up when that has been so for too long."""
        now = time.perf_counter()
        self.unsaved_since = self.unsaved_since or now
        most_hours = getattr(self.hparams, "max_unsaved_hours", 2.0)
        if now - self.unsaved_since > 3600 * most_hours:
            raise InputError(f"{error} Nothing could be saved for {most_hours:g} hours: start again then.") from error
        logger.error("%s Training goes on, and tries again.", error)

    def _save_progress(self, _brain: Any, path: Path) -> None:
        """Save the counters that SpeechBrain does not know of, when all that came before is in the log."""
        self.log.flush()
        state = {
            **self.account.state(),
            "histogram": self.shared_histogram,
            "best_error": self.best_error,
            "valid_set": self._valid_content(),
            "rate_scale": self.rate_scale,
            "rewinds": self.rewinds,
            "best_perplexity": self.log.best_perplexity,
            "validation_due": self.validation_due,
            **self.guard.state(),
        }
        torch.save(state, path)

    def _load_progress(self, _brain: Any, path: Path, end_of_epoch: bool) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.account.load(state)
        # histograms are added up over the ranks: the first holds what all had
        self.tally.histogram = state["histogram"] * (self.rank == 0)
        here = self._valid_content()
        self.best_error = state["best_error"]
        if None not in (here, state["valid_set"]) and state["valid_set"] != here:
            logger.warning("The validation set is another than before: the best so far does not count any more.")
            self.best_error = math.inf
        # a run that went back here with a lower rate keeps it
        self.rate_scale = min(self.rate_scale, state["rate_scale"])
        self.rewinds = max(self.rewinds, state["rewinds"])
        self.log.best_perplexity = state["best_perplexity"]
        self.guard.load(state)
        self.validation_due, self.saved_update = state["validation_due"], None

    @property
    def _error_name(self) -> str:
        """What checkpoints call what the best validation has the least of."""
        return "valid_loss" if self.model.chosen_by == "loss" else "valid_error"

    def _save_encoder(self, name: str, entry: dict[str, Any] | None = None) -> None:
        """Write the artefact of this step."""
        if not if_main_process():
            return
        facts = {
            **self.run_facts,
            "step": self.optimizer_step,
            "audio_hours": self.account.audio_hours,
            "device_hours": self.account.device_hours,
            "validation": entry,
        }
        with self.clock.saving():
            try:
                lines = self.log.lines.read()
            except OSError as error:
                logger.warning("The log cannot be read (%s): the card of %s tells no curve.", error, name)
                lines = []
            card = write_card(facts, [line for line in lines if line["event"] == "valid"])
            self.encoders.write(name, self.model.speech_encoder, card, facts)

    def _write_missing_encoder(self, checkpoint: Any) -> None:
        """Write the encoder of the last update of a run that is done, where it is wanted and is not there."""
        step = checkpoint.meta["step"]
        name = f"encoder@{step}"
        if not if_main_process() or step not in self.hparams.encoder_at_steps or (self.folder / name).exists():
            return
        check_resumable(self.checkpointer, self.model, self.sampler)
        self.checkpointer.load_checkpoint(checkpoint)
        self._save_encoder(name)
        if self.encoders.owed:
            raise InputError(f"{self.folder / name} could not be written: make room, and start again.")


def allow_many_shapes() -> None:
    """Have PyTorch compile every shape of the ladder, where by default it stops after eight, each as one graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1024)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 4096)
    # a layer is a graph of its own, beside whose gradients others are sent: DDP need not cut it up for that
    torch._dynamo.config.optimize_ddp = False


class _RewindError(Exception):
    """Leaves SpeechBrain's loop over the epochs, to begin it again from the last checkpoint."""
