"""A GPU that is not there: tensors that know their device, shape and type, and hold nothing.

PyTorch's fake tensors refuse what a GPU would, an operation on tensors of several devices; and whatever would make the
host wait for a value. A step that goes through is one that a GPU can do, but for the backward pass, which takes a real
one, and for what kernels there do.

Tests load this file from its path.
"""

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from speechbrain_bestrq import encoder
from speechbrain_bestrq.tables import TableModule

CUDA = torch.device("cuda")


class StepDone(Exception):  # noqa: N818 - not an error
    """The step went through; the run ends there, for its weights are gone."""


@contextlib.contextmanager
def absent_gpu():
    """Within it a tensor can be moved to "cuda", and autocast takes it for a GPU with bfloat16."""
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        torch.backends.cudnn.flags(enabled=False),  # asks the driver
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def move_module(module):
    """Bring a module there in place, as ``to("cuda")`` does."""
    there = {}  # shared weights stay shared
    for one in module.modules():
        for tensors in (one._parameters, one._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there.setdefault(id(tensor), (move(tensor), tensor))  # kept, so that no other gets its number
                    tensors[name] = there[id(tensor)][0]
        if isinstance(one, TableModule):  # what it does beyond parameters and buffers
            with mock.patch.multiple(one, _parameters={}, _buffers={}):
                one._apply(move, recurse=False)


def move(tensor):
    """A tensor, or a parameter, on the GPU."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach().to(CUDA), tensor.requires_grad)
    return tensor.to(CUDA)


@contextlib.contextmanager
def first_step_there(brain_class):
    """Within it a Brain of a class does its first step of training there, which ends the run; there must be one."""
    fit_batch, draw_exponential = brain_class.fit_batch, torch.Tensor.exponential_

    def exponential(tensor, generator=None):  # fake tensors draw with none
        return draw_exponential(tensor)

    def backward(loss):
        if loss.device.type != "cuda" or not loss.requires_grad:
            raise AssertionError(f"a loss on {loss.device}, to be minimised: {loss.requires_grad}")
        for parameter in parameters(brains[0]):
            parameter.grad = torch.zeros_like(parameter)

    def ctc_loss(log_probs, targets, *lengths, **_):  # PyTorch's asks the driver
        if targets.device != log_probs.device:
            raise AssertionError(f"targets on {targets.device}, scores on {log_probs.device}")
        if waited_for := {str(one.device) for one in lengths} - {"cpu"}:
            raise AssertionError(f"the host reads lengths that are on {waited_for}")
        return log_probs.sum((0, 2))

    def on_the_gpu(brain, batch):
        brains.append(brain)
        with absent_gpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            patch.setattr(torch.Tensor, "exponential_", exponential)
            patch.setattr(torch.nn.functional, "ctc_loss", ctc_loss)
            # what is drawn on the host and read there: the layers to drop, a speed of SpeechBrain's
            patch.setattr(encoder, "draw_kept", lambda layers, _: [number % 2 == 0 for number in range(layers)])
            patch.setattr(torch, "randint", lambda *_, **__: 0)
            patch.setattr(brain, "training_ctx", torch.autocast("cuda", torch.bfloat16))
            brain.device = CUDA
            move_module(brain.modules)
            for held in (
                brain,
                *(getattr(brain, part, None) for part in ("tally", "guard", "account", "_running_loss")),
            ):
                for name, value in list(vars(held).items()) if held else []:
                    if isinstance(value, torch.Tensor):
                        setattr(held, name, move(value))
            brain.init_optimizers()
            brain.optimizer_parameters = parameters(brain)
            fit_batch(brain, batch)
        raise StepDone

    brains = []
    with mock.patch.object(brain_class, "fit_batch", on_the_gpu), pytest.raises(StepDone):
        yield


def parameters(brain):
    """What a Brain's optimizers train."""
    groups = [group for optimizer in brain.optimizers_dict.values() for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]
