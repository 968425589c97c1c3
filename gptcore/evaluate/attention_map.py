"""Which tokens of a text look at which: the attention weights of a model, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptcore._files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gptcore.models import GPT
    from gptcore.text import PretrainedTokenizer, Tokenizer

_LABELLED = 40
"""Most tokens whose texts still fit along the side of a map."""
_MOST = 512
"""Most tokens of a map: of one head alone each is two pixels wide, and memory grows with the square."""


@torch.no_grad()
def attention_weights(model: GPT, tokens: Sequence[int], layers: Sequence[int], heads: Sequence[int]) -> Tensor:
    """``(layers, heads, T, T)`` float32: how much of each token's (row's) attention goes to each (column).

    Raises:
        ValueError: a model whose attention is fused and never holds the weights; no tokens, or more than the context or 512.
    """
    most = min(_MOST, model.config.context)
    if not 0 < len(tokens) <= most:
        raise ValueError(f"text: got {len(tokens) or 'no'} tokens; accepted are 1 to {most}")
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
    """Draws a heatmap for each of `layers` (rows of the picture) and `heads` (columns) and writes a PNG.

    Args:
        model: with ``attention_impl="explicit"``.
        tokenizer: the model's.
        text: what it reads, up to 512 tokens.
        out: the picture; appears whole or not at all.
        layers, heads: counted from 0; None for all.

    Returns:
        What is drawn, ``(layers, heads, T, T)``.

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
    labels = [repr(tokenizer.decode([token]))[1:-1] for token in tokens]  # line ends and their like as they are typed
    single = len(rows) * len(columns) == 1
    # Inches: room for the labels, where there are some.
    side = max(3.0, 0.28 * min(len(tokens), _LABELLED)) if single else 1.3
    figure = Figure(figsize=(side * len(columns) + 1.2, side * len(rows) + 0.9), layout="constrained")
    grid: list[list[Axes]] = figure.subplots(len(rows), len(columns), squeeze=False).tolist()
    image = None
    for layer, line in enumerate(grid):
        for head, axes in enumerate(line):
            image = axes.imshow(weights[layer, head].numpy(), vmin=0, vmax=1, cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == 0:
                axes.set_title(f"head {columns[head]}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {rows[layer]}", fontsize=8)
            if single and len(tokens) <= _LABELLED:
                axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8, parse_math=False)
                axes.set_yticks(range(len(tokens)), labels, fontsize=8, parse_math=False)
    figure.suptitle("rows look at columns", fontsize=9)
    assert image is not None
    figure.colorbar(image, ax=[axes for line in grid for axes in line], shrink=0.6, label="share of attention")
    save_figure(figure, out)
    return weights
