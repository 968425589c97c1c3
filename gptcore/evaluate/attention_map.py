"""Computes a model's attention weights for a text, and draws them as heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptcore._files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gptcore.models import GPT
    from gptcore.text import PretrainedTokenizer, Tokenizer

_MAX_LABELS = 40
"""A map of more tokens has no labels: they would not fit along its sides."""
_MAX_TOKENS = 512
"""Longest text of a map: then a token of a single map is two pixels wide. Memory grows with the square of the length."""


@torch.no_grad()
def attention_weights(model: GPT, tokens: Sequence[int], layers: Sequence[int], heads: Sequence[int]) -> Tensor:
    """Returns the attention weights of these layers and heads, ``(layers, heads, T, T)`` float32.

    A row holds the weights of one query token, a column those of one key token; a row sums to 1.

    Raises:
        ValueError: fused attention, which never stores the weights; no tokens, more than the context, or more than 512.
    """
    longest = min(_MAX_TOKENS, model.config.context)
    if not 0 < len(tokens) <= longest:
        raise ValueError(f"text: got {len(tokens) or 'no'} tokens; accepted are 1 to {longest}")
    device = next(model.parameters()).device
    _, weights = model(torch.tensor([list(tokens)], device=device), return_attention=True)
    return torch.stack([weights[layer][0, list(heads)] for layer in layers]).float().cpu()


def draw_attention(
    model: GPT,
    tokenizer: Tokenizer | PretrainedTokenizer,
    text: str,
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """Draws a heatmap for each layer (a row of the picture) and head (a column), and writes a PNG or, by the name, an SVG.

    Args:
        model: a model with ``attention_impl="explicit"``.
        tokenizer: the model's tokenizer.
        text: the text that the model reads, up to 512 tokens.
        out: the file to write; it appears complete or not at all.
        layers, heads: which to draw, counted from 0; None draws all.

    Returns:
        The weights that are drawn, ``(layers, heads, T, T)``.

    Raises:
        ValueError: a layer or head that the model does not have, or as `attention_weights`.
    """
    from matplotlib.figure import Figure

    config = model.config
    chosen = []
    for name, wanted, count in (("layers", layers, config.n_layer), ("heads", heads, config.n_head)):
        indices = list(range(count)) if wanted is None else list(wanted)
        if not indices or not all(0 <= i < count for i in indices):
            raise ValueError(f"{name}: got {indices}; accepted are one or more of 0 to {count - 1}")
        chosen.append(indices)
    rows, columns = chosen
    tokens = tokenizer.encode_prompt(text)
    weights = attention_weights(model, tokens, rows, columns)
    labels = [repr(tokenizer.decode([token]))[1:-1] for token in tokens]  # with line breaks as \n
    single = len(rows) * len(columns) == 1
    side = max(3.0, 0.28 * min(len(tokens), _MAX_LABELS)) if single else 1.3  # inches; a single map has labels
    figure = Figure(figsize=(side * len(columns) + 1.2, side * len(rows) + 0.9), layout="constrained")
    grid: list[list[Axes]] = figure.subplots(len(rows), len(columns), squeeze=False).tolist()
    image = None
    for layer, line in enumerate(grid):
        for head, axes in enumerate(line):
            image = _heatmap(axes, weights[layer, head], vector=out.suffix == ".svg")
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == 0:
                axes.set_title(f"head {columns[head]}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {rows[layer]}", fontsize=8)
            if single and len(tokens) <= _MAX_LABELS:
                axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8, parse_math=False)
                axes.set_yticks(range(len(tokens)), labels, fontsize=8, parse_math=False)
    figure.suptitle("rows look at columns", fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=[axes for line in grid for axes in line], shrink=0.6, label="share of attention")
    save_figure(figure, out)
    return weights


def _heatmap(axes: Axes, weights: Tensor, vector: bool) -> Any:
    """Draws ``(T, T)`` weights: as a picture, or in an SVG as rectangles, which stay sharp."""
    if not vector:
        return axes.imshow(weights.numpy(), vmin=0, vmax=1, cmap="magma")
    edges = torch.arange(len(weights) + 1) - 0.5  # the middle of a rectangle is the token's number, as in a picture
    image = axes.pcolormesh(edges.numpy(), edges.numpy(), weights.numpy(), vmin=0, vmax=1, cmap="magma")
    axes.set_aspect("equal")
    axes.invert_yaxis()
    return image
