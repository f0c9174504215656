"""Tables of positions, which grow with the longest input and go where their module goes."""

from collections.abc import Callable

from torch import Tensor, nn


class TableModule(nn.Module):
    """A module with tables that are functions of a length alone, and grow when a longer input comes.

    They go with the module to a device or another type, as buffers do, but are none: DistributedDataParallel sends the
    main process's buffers to the others, in one piece, and their tables may be of other lengths. What arrived would be
    other positions, without an error.

    Example
    -------
    >>> class Ramp(TableModule):
    ...     tables = ("ramp",)
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.ramp = torch.arange(3.0)
    >>> import torch
    >>> module = Ramp().to("meta")
    >>> module.ramp.device.type, list(module.buffers()), list(module.state_dict())
    ('meta', [], [])
    """

    #: Attributes that hold them.
    tables: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TableModule":
        super()._apply(fn, recurse)
        for name in self.tables:
            setattr(self, name, fn(getattr(self, name)))
        return self
