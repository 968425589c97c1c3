"""Registers a kernel as a PyTorch dispatcher op, so that torch.compile sees one opaque call with known outputs.

Each backend has a namespace of its own (``torch.ops.gptkernels_triton``) with the same op names and schemas; the
autograd Functions differ between backends only in the namespace they call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

launchers: dict[str, Callable[[], Callable[..., Any]]] = {}
"""By op name, what imports and returns the function behind the op; filled by `register`, read by compile_report."""


def register(name: str, schema: str, *, fake: Callable[..., Any], module: str) -> None:
    """Defines ``gptkernels_triton::{name}{schema}``, computed by the function of that name in `module`.

    The module is imported at the op's first call: `import gptkernels` must work, and be quick, without triton.
    `fake` returns the outputs' shapes, dtypes and layouts.
    """
    qualified = f"gptkernels_triton::{name}"

    @cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    launchers[name] = load

    def kernel(*args: Any) -> Any:
        return load()(*args)

    torch.library.define(qualified, schema)
    # CPU tensors reach a Triton kernel only in the interpreter: backend.choose sees to that.
    torch.library.impl(qualified, ("CUDA", "CPU"), kernel)
    torch.library.register_fake(qualified, fake)


def ops(backend: str) -> Any:
    """The namespace that holds `backend`'s ops."""
    return getattr(torch.ops, f"gptkernels_{backend}")
