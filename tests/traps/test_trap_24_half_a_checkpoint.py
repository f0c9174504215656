"""A checkpoint that was not saved to its end is not there."""

import pytest
import torch

from speechbrain_bestrq.checkpointing import AtomicCheckpointer


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    """Trap: the meta file is written first, and half a checkpoint passes for a whole one.

    Mutation: in checkpointing.py, AtomicCheckpointer.save_checkpoint, ``self._publish(self._write(folder, meta,
    end_of_epoch))`` -> ``self._write(folder.with_name(folder.name.removeprefix("UNFINISHED+")), meta,
    end_of_epoch)``.
    """
    model = torch.nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(checkpoints_dir=tmp_path / "save", recoverables={"model": model})
    whole = checkpointer.save_checkpoint(meta={"step": 1})
    saved = model.weight.detach().clone()

    def killed(path, *arguments):
        raise Killed

    checkpointer.add_recoverable("late", torch.nn.Linear(1, 1), custom_save_hook=lambda _, path: killed(path))
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(Killed):
        checkpointer.save_checkpoint(meta={"step": 2})

    restarted = AtomicCheckpointer(checkpoints_dir=tmp_path / "save", recoverables={"model": model})
    assert restarted.recover_if_possible().path == whole.path
    assert torch.equal(model.weight, saved)
    # what was left over goes when this process saves: until then it might be another's, still at it
    newer = restarted.save_checkpoint(meta={"step": 3})
    assert {path.name for path in (tmp_path / "save").iterdir()} == {whole.path.name, newer.path.name}
