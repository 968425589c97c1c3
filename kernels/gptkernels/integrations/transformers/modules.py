"""Parts of transformers' models besides norms and activations: gated MLPs, GPT-2's MLP, rotary embeddings.

For each the forward that it gets, and how it is recognised.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.pytorch_utils import Conv1D

from gptkernels import gelu, rotary, swiglu
from gptkernels import swap as _swap


def _hooked(module: nn.Module) -> bool:
    """Whether somebody watches what goes through `module`, which then has to be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class SwiGLU:
    """The forward of gated MLPs, ``down_proj(silu(gate_proj(x)) * up_proj(x))``: gate and product in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if type(self.act_fn) not in _SILU or _hooked(self.act_fn):
            return super().forward(x)  # type: ignore[misc]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


_SILU = (nn.SiLU, SiLUActivation)


class BiasGELU:
    """The forward of GPT-2's MLP: the first projection's bias is added in GELU's own pass."""

    c_fc: Any
    c_proj: nn.Module
    act: Any
    dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        form = _FORMS.get(_swap.kind_of(self.act))
        if form is None or type(self.c_fc) is not Conv1D or _hooked(self.c_fc) or _hooked(self.act):
            return super().forward(hidden_states)  # type: ignore[misc]
        hidden = torch.matmul(hidden_states, self.c_fc.weight)
        return self.dropout(self.c_proj(gelu(hidden, self.c_fc.bias, form)))


_FORMS: dict[Any, str] = {_swap.TanhGELU: "tanh", _swap.ExactGELU: "none"}


class Rotary:
    """The forward of layers that call their file's ``apply_rotary_pos_emb``: the same code, with ours under that name."""

    _gptkernels_original: type[nn.Module]

    def __init_subclass__(cls) -> None:
        theirs: Any = cls._gptkernels_original.forward
        rotate = _fused_rotary(theirs.__globals__["apply_rotary_pos_emb"])
        # Nothing outside this class changes: the file's own function, and every other model of that file, stay as they are.
        scope = {**theirs.__globals__, "apply_rotary_pos_emb": rotate}
        forward = types.FunctionType(theirs.__code__, scope, theirs.__name__, theirs.__defaults__, theirs.__closure__)
        forward.__kwdefaults__, forward.__doc__ = theirs.__kwdefaults__, theirs.__doc__
        cls.forward = forward


def _fused_rotary(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        head_dim = q.shape[-1]
        # Wider tables make a wider result, unless autocast narrows it again.
        same = cos.dtype == q.dtype == k.dtype
        same |= cos.dtype == torch.float32 and torch.is_autocast_enabled(q.device.type)
        if args or kwargs or not same or cos.ndim != 3 or q.ndim != 4 or not cos.shape[-1] == k.shape[-1] == head_dim:
            return theirs(q, k, cos, sin, *args, **kwargs)
        cos, sin = cos[..., : head_dim // 2], sin[..., : head_dim // 2]  # (B or 1, T, D / 2): the halves are equal
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return apply_rotary_pos_emb


def is_swiglu(module: Any) -> bool:
    if {n for n, _ in module.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    if type(module.act_fn) not in _SILU:
        return False
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (nn.Linear(n, m, bias=False).double() for n, m in ((4, 6), (4, 6), (6, 4)))
    for layer in (gate, up, down):
        layer.weight.data.normal_(generator=generator)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    exact = down(F.silu(gate(x)) * up(x)).detach()
    double = _swap.stand_in(module, gate_proj=gate, up_proj=up, down_proj=down, act_fn=module.act_fn)
    return _swap.agrees(lambda: type(module).forward(double, x), exact, 1e-9)


def is_gpt2_mlp(module: Any) -> bool:
    if {n for n, _ in module.named_children()} != {"c_fc", "c_proj", "act", "dropout"}:
        return False
    if type(module.c_fc) is not Conv1D or (form := _FORMS.get(_swap.kind_of(module.act))) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    fc, proj = Conv1D(6, 4).double(), Conv1D(4, 6).double()
    for parameter in (*fc.parameters(), *proj.parameters()):
        parameter.data.normal_(generator=generator)
    x = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    exact = proj(F.gelu(fc(x), approximate=form)).detach()
    double = _swap.stand_in(module, c_fc=fc, c_proj=proj, act=module.act, dropout=nn.Identity())
    return _swap.agrees(lambda: type(module).forward(double, x), exact, 1e-9)


def is_rotary_attention(module: nn.Module) -> bool:
    """Whether the layer rotates by halves: GPT-J's and others' functions of the same name pair neighbours."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or "apply_rotary_pos_emb" not in code.co_names:
        return False
    theirs: Any = forward.__globals__.get("apply_rotary_pos_emb")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 2, 3, 8, generator=generator, dtype=torch.float64)
    cos, sin = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64).repeat(1, 1, 1, 2)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]

    return _swap.agrees(lambda: torch.stack(theirs(q, k, cos, sin)), torch.stack([turned(q), turned(k)]), 1e-9)


def halves_are_equal(embedding: nn.Module) -> bool:
    """Whether a rotary embedding gives each angle twice, a half apart: what rotating by halves takes for granted."""
    try:
        device = next(embedding.buffers()).device
        x, positions = torch.zeros(1, 3, 1, device=device), torch.arange(3, device=device)[None]
        with torch.no_grad():  # a copy, for the ones that keep the longest length they have seen
            both = type(embedding).forward(_swap.stand_in(embedding, **dict(embedding.named_buffers())), x, positions)
        return all(torch.equal(*table.chunk(2, dim=-1)) for table in both)
    except Exception:
        return False
