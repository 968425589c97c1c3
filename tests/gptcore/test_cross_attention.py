"""Cross-attention: PyTorch's own with the same weights, blind to padding, and keys and values that are computed once."""

from __future__ import annotations

import pytest
import torch
from gptkernels import available_backends
from gptkernels.testing import assert_within_budget
from torch import Tensor, nn

from gptcore.nn import CrossAttention, KeyValueCache

WIDTH, HEADS = 48, 3
LENGTHS = [11, 1, 7]


def make(device: str, **options) -> tuple[CrossAttention, Tensor, Tensor, Tensor]:
    """The layer, three sequences of queries, their sources and how much of each source is not padding."""
    torch.manual_seed(0)
    layer = CrossAttention(WIDTH, HEADS, **options).to(device)
    x, source = torch.randn(3, 5, WIDTH, device=device), torch.randn(3, 11, WIDTH, device=device)
    return layer, x, source, torch.tensor(LENGTHS, device=device)


def pytorchs(layer: CrossAttention, dtype: torch.dtype) -> nn.MultiheadAttention:
    """PyTorch's attention with the weights of `layer`."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.q_attn.weight, layer.c_attn.weight]))
        theirs.in_proj_bias.copy_(torch.cat([layer.q_attn.bias, layer.c_attn.bias]))
        theirs.out_proj.weight.copy_(layer.c_proj.weight)
        theirs.out_proj.bias.copy_(layer.c_proj.bias)
    return theirs.to(layer.c_proj.weight.device, dtype)


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
@pytest.mark.parametrize("kernels", available_backends())
def test_values_and_gradients_are_pytorchs(kernels: str, implementation: str, device: str):
    layer, x, source, lengths = make(device, backend=kernels, implementation=implementation)
    grad = torch.randn_like(x)

    def of_pytorch(dtype: torch.dtype) -> dict[str, Tensor]:
        theirs = pytorchs(layer, dtype)
        ours, given = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, source))
        padding = torch.arange(11, device=device) >= lengths[:, None]
        out, weights = theirs(ours, given, given, key_padding_mask=padding, average_attn_weights=False)
        out.backward(grad.to(dtype))
        found = {"out": out, "weights": weights, "x": ours.grad, "source": given.grad}
        found["q_attn.weight"], found["c_attn.weight"] = theirs.in_proj_weight.grad.split([WIDTH, 2 * WIDTH])
        found["q_attn.bias"], found["c_attn.bias"] = theirs.in_proj_bias.grad.split([WIDTH, 2 * WIDTH])
        return found | {"c_proj.weight": theirs.out_proj.weight.grad, "c_proj.bias": theirs.out_proj.bias.grad}

    x.requires_grad_()
    source.requires_grad_()
    out, weights = layer(x, source, lengths)
    out.backward(grad)
    found = {"out": out, "x": x.grad, "source": source.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    if implementation == "explicit":
        found["weights"] = weights
    else:
        assert weights is None
    plain, exact = of_pytorch(torch.float32), of_pytorch(torch.float64)
    assert set(found) | {"weights"} == set(plain)
    for name, value in found.items():
        assert_within_budget(name, value, plain[name], exact[name])


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
@pytest.mark.parametrize("kernels", available_backends())
def test_padding_is_not_attended_to(kernels: str, implementation: str, device: str):
    layer, x, source, lengths = make(device, backend=kernels, implementation=implementation)
    padding = torch.arange(11, device=device) >= lengths[:, None]
    source.requires_grad_()
    out, _ = layer(x, source, lengths)
    out.sum().backward()
    assert (source.grad[padding] == 0).all()
    assert (source.grad[~padding] != 0).any(-1).all()
    with torch.no_grad():
        again, _ = layer(x, source.masked_fill(padding[..., None], 1e3), lengths)
        assert torch.equal(again, out)
        alone, _ = layer(x[2:], source[2:, : LENGTHS[2]])
        torch.testing.assert_close(alone, out[2:])


def test_keys_and_values_are_computed_once(device: str):
    layer, x, source, lengths = make(device, backend="reference", layer=1)
    whole, _ = layer(x, source, lengths)
    calls = []
    layer.c_attn.register_forward_hook(lambda *_: calls.append(1))
    cache = KeyValueCache(n_layer=2, capacity=5)
    for token in range(5):
        out, _ = layer(x[:, token : token + 1], source, lengths, cache)
        torch.testing.assert_close(out, whole[:, token : token + 1])
    assert len(calls) == 1


@pytest.mark.parametrize("implementation", ["fused", "explicit"])
def test_dropout_drops_weights_in_training_alone(implementation: str, device: str):
    layer, x, source, lengths = make(device, backend="reference", dropout=0.5, implementation=implementation)
    first, second = (layer(x, source, lengths)[0] for _ in range(2))
    assert not torch.equal(first, second)
    layer.eval()
    first, second = (layer(x, source, lengths)[0] for _ in range(2))
    assert torch.equal(first, second)
