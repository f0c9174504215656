"""Brains that hold an encoder as SpeechBrain's wav2vec2 recipes do, and ranks that train them.

Tests load this file from its path; so do the processes of :func:`train_ranks`.
"""

import runpy
from functools import partial
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.batch import PaddedBatch

from speechbrain_bestrq.attention import RelativeAttention, RotaryAttention
from speechbrain_bestrq.transformer import SinusoidalPositions

#: The one entry that is swapped.
WAV2VEC2_YAML = """
wav2vec2: !new:speechbrain_bestrq.PretrainedEncoder
    source: !ref <source>
    save_path: !ref <save_folder>/wav2vec2_checkpoint
    output_norm: True
    freeze: !ref <freeze_wav2vec2>
"""
#: What the other optimizer trains.
MODEL_YAML = """
model: !new:torch.nn.ModuleList
    - [!ref <head>]
"""
#: What else all three recipes say of the encoder.
ENCODER_YAML = """
number_of_epochs: 1
freeze_wav2vec2: False
freeze_wav2vec2_conv: False
modules:
    wav2vec2: !ref <wav2vec2>
    head: !ref <head>
opt_class: !name:torch.optim.Adam
    lr: 0.01
wav2vec2_opt_class: !name:torch.optim.Adam
    lr: 0.001
    weight_decay: 0.1
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
epoch_counter: !new:speechbrain.utils.epoch_loop.EpochCounter
    limit: !ref <number_of_epochs>
train_logger: !new:speechbrain.utils.train_logger.FileTrainLogger
    save_file: !ref <save_folder>/train_log.txt
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
        self.optimizers_dict = {"model_optimizer": self.optimizer}
        if not self.hparams.freeze_wav2vec2:
            self.optimizers_dict["wav2vec2_optimizer"] = self.wav2vec2_optimizer
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


def make_hparams(recipe, source, save_folder, wav2vec2=WAV2VEC2_YAML, model=MODEL_YAML, **overrides):
    """What a recipe's YAML builds, with these two entries."""
    torch.manual_seed(1)
    Path(save_folder).mkdir(parents=True, exist_ok=True)
    text = f"source: {source}\nsave_folder: {save_folder}\n{HEADS[recipe]}{wav2vec2}{model}{ENCODER_YAML}"
    hparams = load_hyperpyyaml(text, overrides)
    if not hparams["freeze_wav2vec2"] and hparams["freeze_wav2vec2_conv"]:
        hparams["wav2vec2"].model.feature_extractor._freeze_parameters()
    return hparams


def make_brain(recipe, hparams, brain_class=None, **run_opts):
    """A recipe's Brain, or one of its kind."""
    options = {"device": "cpu", "noprogressbar": True, **run_opts}
    return (brain_class or BRAINS[recipe])(hparams["modules"], None, hparams, options, hparams["checkpointer"])


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


def fit(recipe, source, save_folder, brain_class=None, **overrides):
    """Train a recipe for an epoch, or several, of two batches; return its Brain."""
    brain = make_brain(recipe, make_hparams(recipe, source, save_folder, **overrides), brain_class)
    brain.fit(brain.hparams.epoch_counter, make_batches(), make_batches(1, seed=1))
    return brain


# ---------------------------------------------------------------- ranks


#: :func:`ranks.train_ranks` for functions of this file.
train_ranks = partial(runpy.run_path(str(Path(__file__).with_name("ranks.py")))["train_ranks"], __file__)


def rank_attend(kind, lengths):
    """Hear inputs of this rank's lengths, then one that all hear; return how far it is from what a new module makes."""
    make = {"rotary": RotaryAttention, "relative": RelativeAttention, "sinusoidal": Placed}[kind]
    module = torch.nn.parallel.DistributedDataParallel(make(8, 2, table_frames=4))
    for frames in lengths[torch.distributed.get_rank()]:
        module(torch.randn(1, frames, 8)).sum().backward()
    fresh, heard = make(8, 2, table_frames=100), torch.randn(1, 50, 8)
    fresh.load_state_dict(module.module.state_dict())
    return float((module.module(heard) - fresh(heard)).abs().max())


class Placed(torch.nn.Module):
    """Something to train on top of absolute positions."""

    def __init__(self, d_model, _num_heads, table_frames):
        super().__init__()
        self.positions = SinusoidalPositions(d_model, table_frames)
        self.linear = torch.nn.Linear(d_model, d_model)

    def forward(self, x):
        """Add the positions."""
        return self.linear(x + self.positions(x))


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
