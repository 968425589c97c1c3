"""New forwards for parts of transformers' models other than norms and activations: gated MLPs, GPT-2's MLP, rotary embeddings.

Each comes with the matcher that recognises such a part.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from copy import copy
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.pytorch_utils import Conv1D

from gptkernels import gelu, rotary, swiglu
from gptkernels import swap as _swap
from gptkernels._probe import agrees, isolated, logarithmic, probed


def _hooked(module: nn.Module) -> bool:
    """Whether `module` has hooks or a replaced forward, and so must be called itself."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class SwiGLU(_swap.UnaryForward):
    """The forward of gated MLPs, ``down_proj(silu(gate_proj(x)) * up_proj(x))``: gate and product in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def fused(self, x: Tensor) -> Tensor | None:
        if type(self.act_fn) not in _SILU or _hooked(self.act_fn) or x.is_nested:
            return None
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype or gate.shape != up.shape or not gate.dtype.is_floating_point:
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(swiglu(gate, up))


_SILU = (nn.SiLU, SiLUActivation)


class BiasGELU(_swap.UnaryForward):
    """The forward of GPT-2's MLP: the first projection's bias is added in GELU's own pass."""

    c_fc: Any
    c_proj: nn.Module
    act: Any
    dropout: nn.Module

    def fused(self, x: Tensor) -> Tensor | None:
        form = _FORMS.get(_swap.kind_of(self.act)) if _swap.constants_hold(self.act) else None
        if form is None or type(self.c_fc) is not Conv1D or _hooked(self.c_fc) or _hooked(self.act):
            return None
        hidden = torch.matmul(x, self.c_fc.weight)
        return self.dropout(self.c_proj(gelu(hidden, self.c_fc.bias, form)))


_FORMS: dict[Any, str] = {_swap.TanhGELU: "tanh", _swap.ExactGELU: "none"}


class Rotary:
    """The forward of layers that call ``apply_rotary_pos_emb``: the same code, calling our function under that name."""

    _gptkernels_original: type[nn.Module]

    def __init_subclass__(cls) -> None:
        forward = cls._gptkernels_original.forward
        theirs = inspect.unwrap(forward).__globals__[_ROTATE]
        cls.forward = _with_global(forward, _ROTATE, _fused_rotary(theirs))


_ROTATE = "apply_rotary_pos_emb"


def _with_global(function: Any, name: str, value: Any) -> Any:
    """A copy of a function, its decorators included, whose own code finds `value` under the global name `name`.

    The original and the other functions of its file still see theirs. None if the code does not use `name`, or a decorator
    does not hold the decorated function in its closure.
    """
    if not isinstance(function, types.FunctionType):
        return None
    scope, closure, attributes = function.__globals__, function.__closure__ or (), vars(function)
    decorated = attributes.get("__wrapped__")
    if decorated is None:
        if name not in function.__code__.co_names:
            return None
        scope = {**scope, name: value}
    else:
        inner = _with_global(decorated, name, value)
        holds = [cell.cell_contents is decorated for cell in closure]
        if inner is None or not any(holds):
            return None
        closure = tuple(types.CellType(inner) if held else cell for cell, held in zip(closure, holds))
        attributes = {**attributes, "__wrapped__": inner}
    copied = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__, copied.__doc__ = function.__kwdefaults__, function.__doc__
    vars(copied).update(attributes)
    return copied


def _fused_rotary(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 4 or kwargs or not _rotates_as_ours(*args):
            return theirs(*args, **kwargs)
        q, k, cos, sin = args
        half = q.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]  # (B or 1, T, D / 2): the halves are equal
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


def _rotates_as_ours(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """Whether `rotary` takes these: one table as wide as a head, with the tokens and sequences of queries and keys."""
    if not all(isinstance(x, Tensor) and not x.is_nested for x in (q, k, cos, sin)) or q.ndim != 4 or k.ndim != 4:
        return False
    batch, _, tokens, head_dim = q.shape
    # Tables of a wider dtype would give a wider result, except under autocast.
    same = cos.dtype == q.dtype or (cos.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type))
    return (
        same
        and k.dtype == q.dtype
        and sin.dtype == cos.dtype
        and (k.shape[0], k.shape[2], k.shape[3]) == (batch, tokens, head_dim)
        and head_dim % 2 == 0
        and cos.ndim == 3
        and cos.shape[0] in (1, batch)
        and (cos.shape[1], cos.shape[2]) == (tokens, head_dim)
        and sin.shape == cos.shape
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
    )


def replace_parts(model: nn.Module) -> _swap.SwapReport:
    """Gives the gated MLPs, GPT-2 MLPs and attention layers of `model` the forwards of this file, as `replace_modules` does.

    Call it after `replace_modules`, which finds out which form of GELU the activation of a GPT-2 MLP computes.
    """
    embeddings = [m for m in model.modules() if "RotaryEmbedding" in type(m).__name__]
    halves = all(map(_halves_are_equal, embeddings))

    def matcher(module: nn.Module) -> _swap.Matcher | None:
        children = {name for name, _ in module.named_children()}
        if children == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return _swiglu
        if children == {"c_fc", "c_proj", "act", "dropout"}:
            return _gpt2_mlp
        if _with_global(type(module).forward, _ROTATE, None):
            return _rotary_attention if halves else _unknown_table
        return None

    return _swap.swap_classes(model, matcher)


def _swiglu(module: Any) -> _swap.Match | str:
    name, relies_on = type(module).__name__, {}
    if type(module.act_fn) not in _SILU:
        return f"{name} has an activation other than SiLU"

    def projections(gate: Tensor, up: Tensor, down: Tensor) -> dict[str, Any]:
        return {
            "gate_proj": lambda x: x * gate,
            "up_proj": lambda x: x * up,
            "down_proj": lambda x: x * down,
            "act_fn": F.silu,
        }

    def exact(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, float]:
        return F.silu(x * gate) * (x * up) * down, 0.0

    if agrees(probed(module, projections, relies_on), exact, _numbers("gate", "up", "down"), 1e-9):
        return _swap.Match(SwiGLU, "swiglu", relies_on)
    return f"{name} does not compute down(silu(gate(x)) * up(x))"


def _gpt2_mlp(module: Any) -> _swap.Match | str:
    name, relies_on, form = type(module).__name__, {}, _FORMS.get(_swap.kind_of(module.act))
    if type(module.c_fc) is not Conv1D or form is None:
        return f"{name} has a first projection other than Conv1D, or an activation that is not on gptkernels"

    def act(x: Tensor) -> Tensor:
        return F.gelu(x, approximate=form)

    def projections(fc: Tensor, proj: Tensor, kept: Tensor) -> dict[str, Any]:
        return {
            "c_fc": lambda x: x * fc,
            "act": act,
            "c_proj": lambda x: x * proj,
            "dropout": lambda x: x * kept,
        }

    def exact(x: Tensor, fc: Tensor, proj: Tensor, kept: Tensor) -> tuple[Tensor, float]:
        return act(x * fc) * proj * kept, 0.0

    if agrees(probed(module, projections, relies_on), exact, _numbers("fc", "proj", "kept"), 1e-9):
        return _swap.Match(BiasGELU, "gelu", relies_on)
    return f"{name} does not compute dropout(c_proj(gelu(c_fc(x))))"


def _numbers(*names: str) -> dict[str, Tensor]:
    """Test numbers for ``x`` and for `names`, the factors that stand for projections: of every size, each with infinities."""
    with isolated():
        generator = torch.Generator().manual_seed(0)
        inputs = {name: logarithmic(2, 64, 3, generator=generator) for name in ("x", *names)}
        for place, values in enumerate(inputs.values()):
            values[0, place] = torch.inf
            values[1, place] = -torch.inf
    return inputs


def _unknown_table(module: nn.Module) -> str:
    return f"{type(module).__name__} gets rotary tables whose two halves may differ"


def _rotary_attention(module: nn.Module) -> _swap.Match | str:
    """Matches layers that rotate by halves of a head; functions of the same name, GPT-J's for one, pair neighbours."""
    theirs: Any = inspect.unwrap(type(module).forward).__globals__.get(_ROTATE)

    def exact(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x, cos, sin = x.double(), _twice(cos.double()), _twice(sin.double())
        low, high = x.chunk(2, dim=-1)
        a, b = x * cos[:, None], torch.cat([-high, low], dim=-1) * sin[:, None]
        return a + b, a.abs() + b.abs()

    def compute(training: bool, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.stack(theirs(*x, _twice(cos), _twice(sin)))

    with isolated():
        generator = torch.Generator().manual_seed(0)
        x = logarithmic(2, 2, 2, 3, 8, generator=generator)
        x[:, 1, 1, 2, 3] = torch.inf
        cos, sin = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    if agrees(compute, exact, {"x": x, "cos": cos, "sin": sin}, 1e-9):
        return _swap.Match(Rotary, "rotary")
    return f"{type(module).__name__} does not rotate queries and keys by halves of a head"


def _twice(table: Tensor) -> Tensor:
    return torch.cat([table, table], dim=-1)


def _halves_are_equal(embedding: nn.Module) -> bool:
    """Whether both halves of a rotary embedding's tables are equal, as our `rotary` assumes.

    A copy is run, with frequencies on the CPU, because some embeddings store the longest length that they have seen.
    """
    tensors = {name: value for name, value in vars(embedding).items() if isinstance(value, Tensor)}
    with isolated():
        try:
            for training, dtype, last in product((True, False), (torch.float32, torch.bfloat16), (2, 100_000)):
                double: Any = copy(embedding)
                double.__dict__ = {**vars(embedding), **{name: _frequencies(value) for name, value in tensors.items()}}
                double._buffers = {name: _frequencies(value) for name, value in embedding.named_buffers()}
                double.training = training
                positions = torch.tensor([[0, 1, last]])
                with torch.no_grad():
                    both = type(embedding).forward(double, torch.zeros(1, 3, 1, dtype=dtype), positions)
                if not all(torch.equal(*table.chunk(2, dim=-1)) for table in both):
                    return False
            return True
        except Exception:
            return False


def _frequencies(like: Tensor) -> Tensor:
    """Test frequencies on the CPU with the shape and dtype of a tensor on any device."""
    return torch.linspace(0.1, 1.0, like.numel()).view(like.shape).to(like.dtype)
