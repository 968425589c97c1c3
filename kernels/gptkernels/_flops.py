"""Tells PyTorch's FlopCounterMode what the operations count, once somebody imports it.

Not before: ``torch.utils.flop_counter`` imports triton, and `import gptkernels` must be quick, and work, without.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from torch import Tensor

COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def product(x: Tensor, weight: Tensor) -> int:
    """The operations of ``x @ weight^T``."""
    return 2 * x.numel() * weight.shape[0]


def register(op: Any, formula: Callable[..., int]) -> None:
    """`formula` takes what `op`, a ``torch.ops`` packet, is called with, and returns its floating-point operations."""
    if COUNTER in sys.modules:
        _hand_over(sys.modules[COUNTER], op, formula)
    else:
        _waiting.append((op, formula))


def _hand_over(counter: ModuleType, op: Any, formula: Callable[..., int]) -> None:
    def count(*args: Any, out_val: Any = None) -> int:
        return formula(*args)

    counter.register_flop_formula(op, get_raw=True)(count)


class _AtItsImport(MetaPathFinder):
    """Stands aside at the counter's import, and adds the formulas when it is done."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for op, formula in _waiting:
                _hand_over(module, op, formula)
            _waiting.clear()

        loader.exec_module = exec_module
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AtItsImport())
