"""Registers the operations' FLOP formulas with PyTorch's FlopCounterMode, at the moment when that is imported.

Registering them earlier would import ``torch.utils.flop_counter``, which imports triton; `import gptkernels` must be quick
and must work without triton.
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
    """The FLOPs of ``x @ weight^T``."""
    return 2 * x.numel() * weight.shape[0]


def register(op: Any, formula: Callable[..., int]) -> None:
    """Registers `formula`, which takes the arguments of `op` (a ``torch.ops`` packet) and returns its FLOPs."""
    if COUNTER in sys.modules:
        _register_with(sys.modules[COUNTER], op, formula)
    else:
        _waiting.append((op, formula))


def _register_with(counter: ModuleType, op: Any, formula: Callable[..., int]) -> None:
    def count(*args: Any, out_val: Any = None) -> int:
        return formula(*args)

    counter.register_flop_formula(op, get_raw=True)(count)


class _CounterFinder(MetaPathFinder):
    """Lets the counter be imported as usual, then registers the waiting formulas with it."""

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
                _register_with(module, op, formula)
            _waiting.clear()

        loader.exec_module = exec_module
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterFinder())
