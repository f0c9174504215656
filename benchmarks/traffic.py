"""Kernels and bytes of a computation, counted operator by operator: what memory traffic there is without fusion."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

#: Operators that move nothing, though their schema does not say so.
NOTHING = {"aten::detach", "aten::_unsafe_view"}


@dataclass
class Traffic:
    """What was counted."""

    kernels: int = 0
    """Operators that compute something: no views, no allocations."""
    bytes: int = 0
    """What they read and write: each tensor once for each operator that takes or gives it."""
    by_operator: dict[str, list[int]] = field(default_factory=dict)
    """For each operator its kernels and bytes."""


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        result = function(*arguments, **(named or {}))
        name = function._schema.name
        if _is_view(function._schema) or name in NOTHING or name.startswith("aten::empty"):
            return result
        tensors = [one for one in tree_flatten((arguments, named, result))[0] if isinstance(one, torch.Tensor)]
        if not tensors:
            return result
        # an operator in place gives what it took: the same tensor read and written
        read_and_written = sum(_bytes(one) for one in tensors + _written_silently(function._schema, arguments))
        self.traffic.kernels += 1
        self.traffic.bytes += read_and_written
        counts = self.traffic.by_operator.setdefault(name, [0, 0])
        counts[0] += 1
        counts[1] += read_and_written
        return result


def _written_silently(schema: Any, arguments: tuple) -> list[torch.Tensor]:
    """What an operator writes to and does not give, as the fused optimizers do."""
    if schema.returns:
        return []
    written = [value for one, value in zip(schema.arguments, arguments, strict=False) if _is_written(one)]
    return [one for one in tree_flatten(written)[0] if isinstance(one, torch.Tensor)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(schema: Any) -> bool:
    """Whether an operator gives another look at the memory of what it took."""
    aliases = [one.alias_info for one in schema.returns if one.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _bytes(tensor: torch.Tensor) -> int:
    """Memory behind a tensor; what is expanded counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def count_traffic(function: Callable[[], Any]) -> Traffic:
    """Call a function and count what it and its backward pass do.

    What is compiled shows none of its operators, and counts as nothing.
    """
    with _Counter() as counter:
        function()
    return counter.traffic
