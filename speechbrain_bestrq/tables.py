"""Tables of positions, which grow with the longest input and go where their module goes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TableModule(nn.Module):
    """A module with tables that are functions of a length alone, and grow when a longer input comes.

    They go with the module to a device or another type, as buffers do, but are none: DistributedDataParallel sends the
    main process's buffers to the others, in one piece, and their tables may be of other lengths. What arrived would be
    other positions, without an error.

    A class makes its tables in ``_tabulate``, and calls :meth:`tabulate`.

    Example
    -------
    >>> class Ramp(TableModule):
    ...     tables = ("ramp",)
    ...
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.ramp = torch.empty(0)
    ...         self.tabulate(3)
    ...
    ...     def _tabulate(self, length):
    ...         self.ramp = torch.arange(float(length), device=self.ramp.device)
    >>> module = Ramp()
    >>> module.ramp, list(module.buffers()), list(module.state_dict())
    (tensor([0., 1., 2.]), [], [])
    """

    #: Attributes that hold them.
    tables: tuple[str, ...] = ()

    def _tabulate(self, length: int) -> None:
        """Make the tables for inputs of such a length, where they are."""
        raise NotImplementedError

    def tabulate(self, length: int) -> None:
        """Make the tables for inputs of such a length, to be of use in training even if that is not going on now.

        Arguments
        ---------
        length : int
            Of the inputs, at most.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._tabulate(length)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TableModule":
        super()._apply(fn, recurse)
        for name in self.tables:
            setattr(self, name, fn(getattr(self, name)))
        return self
