"""Brains that hold an encoder as SpeechBrain's wav2vec2 recipes do, and ranks that train them.

Tests load this file from its path; the processes of :func:`train_ranks` run it as a script.
"""

import multiprocessing
import os
import runpy
import time
import traceback
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch

#: What all three recipes say of the encoder, with the one entry that is swapped.
ENCODER_YAML = """
freeze_wav2vec2: False
freeze_wav2vec2_conv: False
wav2vec2: !new:speechbrain_bestrq.PretrainedEncoder
    source: !ref <source>
    save_path: !ref <save_folder>/wav2vec2_checkpoint
    output_norm: True
    freeze: !ref <freeze_wav2vec2>
modules:
    wav2vec2: !ref <wav2vec2>
    head: !ref <head>
model: !new:torch.nn.ModuleList
    - [!ref <head>]
opt_class: !name:torch.optim.Adam
    lr: 0.01
wav2vec2_opt_class: !name:torch.optim.Adam
    lr: 0.001
    weight_decay: 0.1
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: 1
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <save_folder>
    recoverables:
        model: !ref <model>
        wav2vec2: !ref <wav2vec2>
        counter: !ref <epoch_counter>
"""
HEADS = {
    "CTC": """
head: !new:speechbrain.lobes.models.VanillaNN.VanillaNN
    input_shape: [null, null, 16]
    dnn_blocks: 1
    dnn_neurons: 5
""",
    "IEMOCAP": """
head: !new:speechbrain.nnet.linear.Linear
    input_size: 16
    n_neurons: 4
    bias: False
avg_pool: !new:speechbrain.nnet.pooling.StatisticsPooling
    return_std: False
""",
    "SLURP": """
embedding: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: 5
    embedding_dim: 6
decoder: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    enc_dim: 16
    input_size: 6
    rnn_type: lstm
    attn_type: content
    hidden_size: 5
    attn_dim: 6
    num_layers: 1
head: !new:torch.nn.ModuleList
    - [!ref <embedding>, !ref <decoder>]
""",
}


class RecipeBrain(sb.Brain):
    """Two optimizers, the encoder's one under the recipes' name; the encoder's mode is noted at every step."""

    def compute_forward(self, batch, stage):
        """Encode, then what the recipe does with it."""
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        if stage == sb.Stage.TRAIN:
            self.modes = getattr(self, "modes", set()) | {self.hparams.wav2vec2.training}
        return self.predict(self.modules.wav2vec2(wavs, wav_lens), wav_lens, batch), wav_lens

    def predict(self, feats, wav_lens, batch):
        """CTC: a network over the frames."""
        return self.hparams.log_softmax(self.modules.head(feats))

    def compute_objectives(self, predictions, batch, stage):
        """CTC."""
        log_probabilities, wav_lens = predictions
        tokens, token_lens = batch.tokens
        return sb.nnet.losses.ctc_loss(log_probabilities, tokens, wav_lens, token_lens, blank_index=0)

    def init_optimizers(self):
        """One optimizer for the encoder and one for the rest."""
        self.wav2vec2_optimizer = self.hparams.wav2vec2_opt_class(self.modules.wav2vec2.parameters())
        self.optimizer = self.hparams.opt_class(self.hparams.model.parameters())
        self.optimizers_dict = {"model_optimizer": self.optimizer, "wav2vec2_optimizer": self.wav2vec2_optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("wav2vec2_opt", self.wav2vec2_optimizer)
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Save after validation."""
        self.losses = getattr(self, "losses", []) + [float(stage_loss)]
        if stage == sb.Stage.VALID and self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(meta={"loss": float(stage_loss)}, min_keys=["loss"])


class EmotionBrain(RecipeBrain):
    """As IEMOCAP's: pooled over the utterance."""

    def predict(self, feats, wav_lens, batch):
        """Classify the mean over the utterance's frames."""
        pooled = self.hparams.avg_pool(feats, wav_lens)
        return self.hparams.log_softmax(self.modules.head(pooled.view(pooled.shape[0], -1)))

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy of the first token, taken as a class."""
        return sb.nnet.losses.nll_loss(predictions[0], batch.tokens.data[:, 0] % 4)


class SluBrain(RecipeBrain):
    """As SLURP's: an attentional decoder over the frames."""

    def predict(self, feats, wav_lens, batch):
        """Decode with the targets as input."""
        embedding, decoder = self.hparams.head
        hidden, _ = decoder(embedding(batch.tokens.data), feats, wav_lens)
        return self.hparams.log_softmax(hidden)

    def compute_objectives(self, predictions, batch, stage):
        """Cross-entropy of each token."""
        tokens, token_lens = batch.tokens
        return sb.nnet.losses.nll_loss(predictions[0], tokens, length=token_lens)


BRAINS = {"CTC": RecipeBrain, "IEMOCAP": EmotionBrain, "SLURP": SluBrain}


def make_hparams(recipe, source, save_folder, **overrides):
    """What a recipe's YAML builds."""
    torch.manual_seed(1)
    Path(save_folder).mkdir(parents=True, exist_ok=True)
    text = f"source: {source}\nsave_folder: {save_folder}\n{HEADS[recipe]}{ENCODER_YAML}"
    hparams = load_hyperpyyaml(text, overrides)
    if not hparams["freeze_wav2vec2"] and hparams["freeze_wav2vec2_conv"]:
        hparams["wav2vec2"].model.feature_extractor._freeze_parameters()
    return hparams


def make_brain(recipe, hparams, **run_opts):
    """A recipe's Brain."""
    options = {"device": "cpu", "noprogressbar": True, **run_opts}
    return BRAINS[recipe](hparams["modules"], None, hparams, options, hparams["checkpointer"])


def make_batches(count=2, seed=0):
    """A loader of batches of two utterances of noise, one shorter, with tokens."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        examples = [
            {
                "sig": 0.1 * torch.randn(samples, generator=generator),
                "tokens": torch.randint(1, 5, (3,), generator=generator),
            }
            for samples in (12000, 8000)
        ]
        batches.append(PaddedBatch(examples))
    return ready_loader(batches)


def ready_loader(batches):
    """A loader of batches that are there already; a Brain would make batches of one out of a list."""
    return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def fit(recipe, source, save_folder, run_opts=None, **overrides):
    """Train a recipe for an epoch of two batches; return its Brain."""
    brain = make_brain(recipe, make_hparams(recipe, source, save_folder, **overrides), **(run_opts or {}))
    brain.fit(brain.hparams.epoch_counter, make_batches(), make_batches(1, seed=1))
    return brain


# ---------------------------------------------------------------- ranks


def train_ranks(scratch, call, count=2, timeout=240):
    """Run a function of this module in several processes of one gloo group; return what each returned."""
    scratch = Path(scratch)
    scratch.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["speechbrain_bestrq.pretraining"])
    processes = []
    for rank in range(count):
        task = {"rank": rank, "count": count, "scratch": str(scratch), "call": call}
        process = context.Process(target=runpy.run_path, args=(__file__, {"task": task}, "__rank__"))
        process.start()
        processes.append(process)
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} ranks gave no answer within {timeout} s"
    results = [torch.load(scratch / f"rank{rank}.pt", weights_only=False) for rank in range(count)]
    errors = [result["error"] for result in results if "error" in result]
    assert not errors, "\n".join(errors)
    return [result["returned"] for result in results]


def run_rank(task):
    """Join the group, run the call, write down what it returned."""
    rank, count, scratch = task["rank"], task["count"], Path(task["scratch"])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), GLOO_SOCKET_IFNAME="lo")
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{scratch / 'store'}", rank=rank, world_size=count
        )
        name, arguments = task["call"]
        report = {"returned": globals()[name](**arguments)}
    except BaseException:
        report = {"error": traceback.format_exc()}
    torch.save(report, scratch / f"rank{rank}.pt")
    # a rank whose partner failed must not wait for it
    os._exit(0)


def rank_fit(recipe, source, save_folder, **overrides):
    """Train on this rank's own batches, without checkpoints; return the encoder's state before and after."""
    hparams = make_hparams(recipe, source, save_folder, **overrides)
    hparams["checkpointer"] = None
    encoder = hparams["wav2vec2"]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    run_opts = {"distributed_launch": True, "distributed_backend": "gloo", "find_unused_parameters": False}
    brain = make_brain(recipe, hparams, **run_opts)
    batches = make_batches(2, seed=torch.distributed.get_rank())
    brain.fit(brain.hparams.epoch_counter, batches)
    return {
        "before": before,
        "after": encoder.state_dict(),
        "wrapped": type(brain.modules.wav2vec2).__name__,
        "trained": [name for name, parameter in encoder.named_parameters() if parameter.requires_grad],
    }


if __name__ == "__rank__":
    run_rank(task)  # noqa: F821 - given by runpy
