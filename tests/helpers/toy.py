"""A pre-training run small enough for a test: its corpus, model, Brain and ranks.

Tests get this module from the fixture ``toy``; the processes of :func:`train_ranks` load it too.
"""

import errno
import os
import runpy
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import speechbrain as sb
import torch
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from speechbrain_bestrq import checkpointing
from speechbrain_bestrq.accounting import JsonLines
from speechbrain_bestrq.audio import AudioTable
from speechbrain_bestrq.batching import LadderBatchSampler, PaddedBatchSampler
from speechbrain_bestrq.bestrq import BestRQ
from speechbrain_bestrq.checkpointing import AtomicCheckpointer
from speechbrain_bestrq.encoder import ConformerEncoder, SpeechEncoder
from speechbrain_bestrq.feature_extractor import ConvFeatureExtractor, FeatureProjection
from speechbrain_bestrq.frontend import ConvSubsampling, LogMel
from speechbrain_bestrq.gumbel_quantizer import GumbelQuantizer
from speechbrain_bestrq.masking import SpanMasking
from speechbrain_bestrq.pretraining import PretrainingBrain
from speechbrain_bestrq.pretraining_data import PretrainingBatch, WaveformDataset, make_loader
from speechbrain_bestrq.quantizer import RandomProjectionQuantizer
from speechbrain_bestrq.ranks import rank_and_size
from speechbrain_bestrq.recipe import load_recipe
from speechbrain_bestrq.schedules import WarmupNoam
from speechbrain_bestrq.transformer import TransformerEncoder
from speechbrain_bestrq.wav2vec2 import Wav2Vec2

RATE = 16000


def write_noise(folder, seconds, seed=0):
    """White noise, a file for each duration."""
    generator = np.random.default_rng(seed)
    waves = [0.1 * generator.standard_normal(round(duration * RATE)) for duration in seconds]
    return write_waves(folder, waves)


def write_levels(folder, count, seconds=1.0, seed=0):
    """Noise of one of four loudnesses throughout each file: what is masked can be told from what is not."""
    generator = np.random.default_rng(seed)
    levels = 0.5 * 0.15 ** generator.integers(4, size=count)
    return write_waves(folder, [level * generator.uniform(-1, 1, round(seconds * RATE)) for level in levels])


def write_waves(folder, waves):
    """Write waveforms as 0.wav, 1.wav... and return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    for number, wave in enumerate(waves):
        soundfile.write(folder / f"{number}.wav", wave, RATE, subtype="FLOAT")
    return folder


def make_table(folder):
    """The utterances of a folder that :func:`write_waves` wrote."""
    paths = sorted(Path(folder).glob("*.wav"), key=lambda path: int(path.stem))
    seconds = [soundfile.info(path).frames / RATE for path in paths]
    return AudioTable([path.stem for path in paths], map(str, paths), seconds, RATE)


def make_model(method="bestrq", **settings):
    """A pre-training model whose weights are a function of its ``model_seed``."""
    return {"bestrq": make_bestrq, "wav2vec2": make_wav2vec2}[method](**settings)


def make_bestrq(
    dropout=0.0,
    layer_drop=0.0,
    d_model=16,
    num_layers=2,
    attention="rotary",
    normalize="utterance",
    codebook_size=32,
    quantizer_seed=0,
    prob=0.3,
    span=2,
    grid=False,
    model_seed=0,
):
    """A BEST-RQ model."""
    torch.manual_seed(model_seed)
    return BestRQ(
        SpeechEncoder(
            LogMel(normalize=normalize),
            ConvSubsampling(d_model=d_model, channels=(4, 4), dropout=dropout),
            ConformerEncoder(
                d_model,
                num_layers,
                num_heads=2,
                d_ffn=32,
                kernel_size=3,
                dropout=dropout,
                layer_drop=layer_drop,
                attention=attention,
            ),
        ),
        RandomProjectionQuantizer(320, codebook_size=codebook_size, seed=quantizer_seed),
        SpanMasking(prob, span, grid=grid),
    )


def make_wav2vec2(
    dropout=0.0,
    layer_drop=0.0,
    extractor_norm="group",
    norm="post",
    normalize_input=False,
    codebook_size=6,
    num_negatives=5,
    temperature_decay=0.9,
    model_seed=0,
    **weights,
):
    """A wav2vec 2.0 model."""
    torch.manual_seed(model_seed)
    return Wav2Vec2(
        SpeechEncoder(
            ConvFeatureExtractor((8,) * 7, norm=extractor_norm, normalize_input=normalize_input),
            FeatureProjection(8, 16, dropout=dropout),
            TransformerEncoder(
                16,
                num_layers=2,
                num_heads=2,
                d_ffn=32,
                dropout=dropout,
                attention_dropout=dropout,
                layer_drop=layer_drop,
                norm=norm,
                position_kernel_size=8,
                position_groups=4,
            ),
        ),
        GumbelQuantizer(8, code_dim=8, codebook_size=codebook_size, temperature_decay=temperature_decay),
        SpanMasking(0.065, 10, min_spans=2),
        target_dim=8,
        num_negatives=num_negatives,
        quantizer_dropout=dropout,
        **weights,
    )


#: Operations whose result, or the size of it, the host has to wait for.
WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
)


class Waits(TorchDispatchMode):
    """Notes each operation that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found, self.operations = [], 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        """Note, and call."""
        self.operations += 1
        selects = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        masks = [x for x in tree_leaves(arguments[1:2]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if function in WAITING or (selects and masks):
            self.found.append(str(function))
        return function(*arguments, **(named or {}))


class RecordingDataset(WaveformDataset):
    """Remembers which utterances were asked for, without loading workers."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.seen = []

    def __getitems__(self, plan):
        """Read a batch and note its utterances."""
        self.seen.append((plan.epoch, plan.indices.tolist()))
        return super().__getitems__(plan)


def make_dataset(table, model, seed=1, rank=0):
    """The recording dataset of a table."""
    return RecordingDataset(table, model.masking, model.speech_encoder.num_frames, seed, rank)


class ReadyBatches(torch.utils.data.Dataset):
    """Batches that are there already, as a dataset."""

    def __init__(self, batches):
        self.batches = batches

    def __getitems__(self, plan):
        """Give the batch of a number."""
        return self.batches[plan]


class InOrder(torch.utils.data.Sampler):
    """Goes through ready batches; what the Brain asks of a sampler."""

    def __init__(self, count):
        self.count, self.epoch, self.position = count, 0, 0

    def set_epoch(self, epoch):
        """Start an epoch."""
        self.epoch, self.position = epoch, 0

    #: What each rank has at the least.
    shared_batches = 0

    def fingerprint(self):
        """Equal for equal batches."""
        return f"{self.count} ready batches"

    content = fingerprint

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(range(self.position, self.count))

    def state_dict(self):
        """The place in the epoch."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        """Go there."""
        self.epoch, self.position = state["epoch"], state["position"]


def make_batch(model, waves, seed=1, rank=0, number=0):
    """A batch of waveforms of any lengths, padded, with the masks and seeds of a rank."""
    lengths = torch.tensor([len(wave) for wave in waves])
    wavs = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(wave).float() for wave in waves], batch_first=True)
    longest = wavs.shape[1]
    step = (seed, rank, number)
    generator = torch.Generator().manual_seed(1000 * seed + 100 * rank + number)
    frames = model.speech_encoder.num_frames
    return PretrainingBatch(
        wavs=wavs,
        wav_lens=None if (lengths == longest).all() else lengths / longest,
        masked=model.masking(frames(lengths), frames(longest), generator),
        noise_seed=hash(step) % 2**31,
        dropout_seed=hash(step) % 2**30,
        number=number,
        seconds=float(lengths.sum()) / RATE,
        cut_seconds=0.0,
    )


class Stopped(Exception):  # noqa: N818 - not an error
    """What ends a run early, as a kill would."""


class ToyBrain(PretrainingBrain):
    """Can be stopped, and remembers the masks it trained on."""

    stop_after = signal_at = None

    def on_fit_start(self):
        """Start remembering."""
        super().on_fit_start()
        self.trained = []

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Remember; stop."""
        super().on_fit_batch_end(batch, outputs, loss, should_step)
        self.trained.append(batch.masked.mask.clone())  # not the file that it came in from a worker
        if should_step and self.optimizer_step == self.signal_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        if should_step and self.optimizer_step == self.stop_after:
            raise Stopped


def make_brain(
    output,
    model,
    *,
    updates=6,
    epochs=1000,
    accumulation=1,
    checkpoint_every=0,
    log_interval=1,
    encoder_at_steps=(),
    max_grad_norm=0.0,
    optimizer="AdamW",
    peak=1e-3,
    warmup=4,
    vector_decay=True,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    eps=1e-9,
    checkpoints=True,
    train_hours=0.5,
    **hparams,
):
    """A Brain with its epoch counter, ``brain.counter``."""
    counter = EpochCounter(epochs)
    checkpointer = None
    if checkpoints:
        recoverables = {"model": model, "counter": counter}
        checkpointer = AtomicCheckpointer(checkpoints_dir=Path(output) / "save", recoverables=recoverables)
    Path(output).mkdir(parents=True, exist_ok=True)

    def optimizer_class(parameters):
        options = {"lr": peak, "weight_decay": weight_decay, "fused": True}
        if optimizer != "SGD":
            options |= {"betas": betas, "eps": eps}
        return getattr(torch.optim, optimizer)(parameters, **options)

    brain = ToyBrain(
        modules={"model": model},
        opt_class=optimizer_class,
        hparams={
            "output_folder": str(output),
            "lr_schedule": WarmupNoam(peak, warmup),
            "log_interval": log_interval,
            "optimizer_step_limit": updates,
            "encoder_at_steps": encoder_at_steps,
            "seed": 1,
            "grad_accumulation_factor": accumulation,
            "ckpt_interval_steps": checkpoint_every,
            "max_grad_norm": max_grad_norm,
            "remove_vector_weight_decay": not vector_decay,
            "noprogressbar": True,
            **hparams,
        },
        run_opts={"device": "cpu", "distributed_backend": "gloo"},
        checkpointer=checkpointer,
        run_facts={
            "corpus": "Toy",
            "train_hours": train_hours,
            "train_utterances": 3,
            "valid_hours": 0.1,
            "command": "python train.py toy.yaml",
        },
    )
    brain.counter = counter
    return brain


def ready_loader(batches):
    """A loader of ready batches."""
    return torch.utils.data.DataLoader(
        ReadyBatches(batches), batch_sampler=InOrder(len(batches)), collate_fn=lambda batch: batch
    )


def fit_batches(output, model, batches, **settings):
    """Train on ready batches, one epoch, validate on nothing, and return the Brain."""
    brain = make_brain(output, model, epochs=1, **{"updates": None, "checkpoints": False, **settings})
    brain.fit(brain.counter, ready_loader(batches), ready_loader([]))
    return brain


def train(
    output,
    train_folder,
    valid_folder=None,
    *,
    seed=1,
    workers=0,
    max_batch_seconds=5.0,
    stop_after=None,
    model=None,
    **settings,
):
    """Train as the recipe does; return the Brain and what it did."""
    rank, world_size = rank_and_size()
    model = make_model(**(model or {}))
    table = make_table(train_folder)
    samples = round(max_batch_seconds * RATE)
    sampler = LadderBatchSampler(table.lengths, samples, seed=seed, rank=rank, world_size=world_size)
    dataset = make_dataset(table, model, seed, rank)
    loader, valid_loader = make_loader(dataset, sampler, workers), ready_loader([])
    if valid_folder is not None:
        valid_table = make_table(valid_folder)
        valid_sampler = PaddedBatchSampler(valid_table.lengths, samples, rank=rank, world_size=world_size)
        valid_loader = make_loader(make_dataset(valid_table, model, 0, 0), valid_sampler, workers)
    brain = make_brain(output, model, **settings)
    brain.stop_after = stop_after
    # as the recipe, the same audio whatever the number of ranks
    every = LadderBatchSampler(table.lengths, samples, seed=seed)
    batches = (batch.to("cpu") for batch in make_loader(make_dataset(table, model), every))
    brain.measure(lambda: [(batch.wavs, batch.wav_lens) for batch in batches])
    try:
        brain.fit(brain.counter, loader, valid_loader)
        stopped = False
    except Stopped:
        stopped = True
    return SimpleNamespace(brain=brain, model=model, sampler=sampler, seen=dataset.seen, stopped=stopped)


def log_lines(output, event="train"):
    """The training or validation entries of a run's log."""
    return [entry for entry in JsonLines(Path(output) / "train_log.jsonl").read() if entry["event"] == event]


def losses(output):
    """(step, loss) of the training lines."""
    return [(entry["step"], entry["loss"]) for entry in log_lines(output)]


# ---------------------------------------------------------------- ranks


#: :func:`ranks.train_ranks` for functions of this file.
train_ranks = partial(runpy.run_path(str(Path(__file__).with_name("ranks.py")))["train_ranks"], __file__)


def rank_train(signal_at=None, **settings):
    """What a rank of a run did, as plain values; it may signal itself in an update."""
    if signal_at is not None:
        ToyBrain.signal_at = signal_at
    result = train(**settings)
    rank, _ = rank_and_size()
    return {
        "state": result.model.state_dict(),
        "seen": result.seen,
        "batches": len(result.sampler),
        "trained": getattr(result.brain, "trained", []),
        "main": sb.utils.distributed.if_main_process(),
        "rank": rank,
        "steps": result.brain.optimizer_step,
    }


def rank_train_diverging(**settings):
    """As :func:`rank_train`; on the second rank the loss is not finite from update 5 on, at the first rate."""

    def compute_objectives(self, predictions, batch, stage):
        spoilt = self.rank == 1 and self.optimizer_step >= 4 and self.rate_scale == 1.0
        return predictions.loss * (float("nan") if spoilt else 1.0)

    ToyBrain.compute_objectives = compute_objectives
    return rank_train(**settings)


def rank_train_on_a_full_disk(**settings):
    """As :func:`rank_train`; the main process' disk takes neither of the first two checkpoints."""
    sync_tree, refused = checkpointing.sync_tree, []

    def full(path):
        if len(refused) < 2:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync_tree(path)

    checkpointing.sync_tree = full
    saved = Path(settings["output"]) / "save"
    done = rank_train(**settings)
    metas = AtomicCheckpointer(checkpoints_dir=saved).list_checkpoints()
    return {**done, "refused": len(refused), "saved": [checkpoint.meta for checkpoint in metas]}


def rank_train_unseen(**settings):
    """As :func:`rank_train`; the second rank sees no checkpoint yet, as it may be in a shared folder."""
    if rank_and_size()[0]:
        AtomicCheckpointer.find_checkpoint = lambda *_, **__: None
    return rank_train(**settings)


def rank_load_recipe(yaml, more):
    """Load a YAML as a recipe does, in the group that is there."""
    sb.utils.distributed.ddp_init_group = lambda options: None
    load_recipe([yaml, *more])


def rank_fit_waves(output, waves, model=None, nan_updates=(), **settings):
    """Train on this rank's own waveforms, a list of utterances for each update."""
    rank, _ = rank_and_size()
    network = make_model(**(model or {}))
    batches = [make_batch(network, one, rank=rank, number=number) for number, one in enumerate(waves)]
    brain = fit_batches(output, network, batches, **settings)
    return {
        "state": network.state_dict(),
        "optimizer": brain.optimizer.state_dict(),
        "skipped": int(brain.account.totals[1]),
        "masks": [batch.masked.mask for batch in batches],
    }
