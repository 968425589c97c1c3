"""A text classifier: a GPT or a BERT with a small head instead of its output layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from gptkernels import cross_entropy
from torch import Tensor, nn

from gptcore.models.bert import BERT, BERTConfig
from gptcore.models.gpt import GPT
from gptcore.models.gpt_config import GPTConfig
from gptcore.models.model import Model, ModelConfig
from gptcore.nn import Kernels, Linear, backend_of

BACKBONES: dict[str, Any] = {model.config_class.model_type: model for model in (GPT, BERT)}
"""The models that a classifier can be made from, by `model_type`."""


@dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
    """The backbone's configuration and the names of the classes.

    How the backbone runs (`kernels`, `dropout`, `attention_impl`) and its `context` are the classifier's: `from_dict` and
    ``from_pretrained`` take changes to the backbone's fields.

    Raises:
        ValueError: fewer than two labels, or labels that are empty or not distinct.
    """

    model_type: ClassVar[str] = "classifier"

    context: int = field(init=False)
    """Longest sequence, tokens: the backbone's."""
    backbone: GPTConfig | BERTConfig
    """The configuration of the model under the head. Its output layer is left out: `tied` or no `masked_words`."""
    labels: tuple[str, ...]
    """The names of the classes; class i is ``labels[i]``."""

    def __post_init__(self) -> None:
        labels = tuple(self.labels)
        if len(labels) < 2 or len(set(labels)) < len(labels) or not all(type(x) is str and x for x in labels):
            raise ValueError(f"labels: got {labels!r}; accepted are two or more distinct names")
        # An output layer that no loss reaches would be saved for nothing, and DistributedDataParallel refuses it.
        bare = {"tied": True} if isinstance(self.backbone, GPTConfig) else {"masked_words": False}
        object.__setattr__(self, "backbone", dataclasses.replace(self.backbone, **bare))
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "context", self.backbone.context)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.backbone.vocab_size

    @property
    def kernels(self) -> Kernels:
        """The kernels that run."""
        return self.backbone.kernels

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Any:
        """Raises ValueError: a classifier is made from a model, not from a named size."""
        raise ValueError("model: got 'classifier', which is made from a base; run: gptcore finetune classify")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ClassifierConfig:
        """Returns the configuration with `backbone` (a configuration or its description) and `labels`.

        All other fields are changes to the backbone's.
        """
        if missing := {"backbone", "labels"} - set(values):
            raise ValueError(f"{min(missing)}: is missing")
        backbone: Any = values["backbone"]
        if isinstance(backbone, dict):
            kind = backbone.get("model_type")
            if kind not in BACKBONES:
                raise ValueError(f"backbone: got model_type {kind!r}; accepted are {', '.join(BACKBONES)}")
            described = {name: value for name, value in backbone.items() if name != "model_type"}
            backbone = BACKBONES[kind].config_class.from_description(described)
        if changes := {name: value for name, value in values.items() if name not in ("backbone", "labels")}:
            fields = {f.name: getattr(backbone, f.name) for f in dataclasses.fields(backbone)}
            backbone = type(backbone).from_dict(fields | changes)
        return cls(backbone, tuple(values["labels"]))

    def description(self) -> dict[str, Any]:
        backbone = {"model_type": self.backbone.model_type, **self.backbone.description()}
        return {"backbone": backbone, "labels": list(self.labels)}


class Classifier(Model):
    """A GPT or a BERT, and a head that gives a score to each class.

    On a GPT the head is one linear layer without bias, on the features of the last token, the only one that has seen the
    whole text (Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018). On a BERT it is a
    linear layer and tanh, the pooler, then a linear layer, on the features of the first token, [CLS] (Devlin et al., arXiv
    1810.04805). These are the heads of transformers' models for sequence classification.
    """

    config_class = ClassifierConfig
    config: ClassifierConfig

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.backend = backend_of(config.backbone.kernels)
        width, classes = config.backbone.width, len(config.labels)
        self.backbone: GPT | BERT = BACKBONES[config.backbone.model_type](config.backbone)
        self.causal = isinstance(self.backbone, GPT)
        if self.causal:
            self.score = Linear(width, classes, bias=False, backend=self.backend)
        else:
            self.pooler = Linear(width, width, backend=self.backend)
            self.dropout = nn.Dropout(config.backbone.dropout)
            self.classifier = Linear(width, classes, backend=self.backend)
        if self.backbone.wte.weight.device.type != "meta":
            self._init_head()

    @classmethod
    def around(cls, base: Model, labels: Iterable[str]) -> Classifier:
        """Returns a classifier that shares the weights of `base`, with a new float32 head on the same device.

        The base itself is left as it is. Its output layer is not part of the classifier.

        Raises:
            ValueError: a base that is neither a GPT nor a BERT, or labels that are not accepted.
        """
        if not isinstance(base, tuple(BACKBONES.values())):
            raise ValueError(f"model: got a {base.config.model_type}; accepted are {', '.join(BACKBONES)}")
        with torch.device("meta"):
            model = cls(ClassifierConfig(base.config, tuple(labels)))
        outside = ("head.", "lm_head.")
        state = {name: value for name, value in base.state_dict().items() if not name.startswith(outside)}
        model.backbone.load_state_dict(state, assign=True)
        for layer in model._head():
            layer.to_empty(device=next(base.parameters()).device)
        model._init_head()
        return model.train(base.training)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.blocks

    def head_parameters(self) -> list[nn.Parameter]:
        """Returns the weights that classification adds to the backbone; they are trained whatever else is frozen."""
        return [parameter for layer in self._head() for parameter in layer.parameters()]

    def last_layers(self) -> list[nn.Module]:
        return self.backbone.last_layers()

    def _head(self) -> list[Linear]:
        return [self.score] if self.causal else [self.pooler, self.classifier]

    def init_weights(self) -> None:
        """Draws the initial weights in place: the backbone's own and the head's.

        Of the head the pooler is normal with deviation 0.02. The last layer is 0, so that all classes begin equally probable:
        a trained backbone's features can be large, and random weights would begin with confident mistakes.
        """
        self.backbone.init_weights()
        self._init_head()

    def _init_head(self) -> None:
        *poolers, last = self._head()
        nn.init.zeros_(last.weight)
        for layer in poolers:
            nn.init.normal_(layer.weight, std=0.02)
        for layer in self._head():
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        lengths: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Returns each text's scores of the classes (logits); with `targets` the cross-entropy instead.

        Args:
            tokens: ``(B, T)`` integer ids below vocab_size.
            lengths: ``(B,)`` the number of tokens of each text before its padding, which is on the right and changes
                nothing; None: all.
            targets: ``(B,)`` int64, the index of each text's class.
            weights: ``(classes,)`` float32: how much a text of each class counts; None: 1.
            reduction: "mean", in which a text counts by its class's weight; "sum"; or "none", each text's loss.

        Returns:
            ``(B, classes)`` float32; with `targets` a scalar, or ``(B,)`` with "none", in nats.

        Raises:
            TypeError: tokens that are not integers.
            ValueError: a rank other than 2, more tokens than the context, an id outside the vocabulary, a length that is
                not from 1 to T (values are checked on the CPU only).
        """
        self._check_lengths(tokens, lengths)
        x = self.backbone.features(tokens, lengths=lengths)  # (B, T, C)
        x = self._pooled(x, lengths)  # (B, C)
        head = self.score if self.causal else self.classifier
        logits = head(x.to(head.weight.dtype)).float()  # (B, classes)
        if targets is None:
            return logits
        losses = cross_entropy(logits, targets, reduction="none", backend=self.backend)  # (B,)
        counted = torch.ones_like(losses) if weights is None else weights[targets]
        losses = losses * counted
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()

    def _pooled(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """``(B, T, C) -> (B, C)``: what the last layer reads."""
        if not self.causal:
            return self.dropout(self.pooler(x[:, 0].to(self.pooler.weight.dtype)).tanh())
        if lengths is None:
            return x[:, -1]
        return x[torch.arange(x.shape[0], device=x.device), lengths - 1]

    def _check_lengths(self, tokens: Tensor, lengths: Tensor | None) -> None:
        if lengths is None or torch.compiler.is_compiling() or lengths.device.type != "cpu":
            return
        if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= tokens.shape[-1]:
            raise ValueError(f"lengths: got {lengths.tolist()}; accepted are 1 to {tokens.shape[-1]}, the row's tokens")

    def flops(self, batch_shape: tuple[int, int]) -> int:
        """Returns the floating-point operations of a training step: those of the backbone's blocks and of the head."""
        batch, tokens = batch_shape
        flops = self.backbone.flops(batch_shape) + 6 * batch * sum(p.numel() for p in self.head_parameters())
        # A GPT counts its tied output layer, which the classifier does not run.
        return flops - 6 * batch * tokens * self.backbone.wte.weight.numel() if self.causal else flops

    def summary(self) -> str:
        labels = self.config.labels
        shown = ", ".join(labels) if len(labels) <= 6 else f"{', '.join(labels[:5])}, ..."
        token = "last" if self.causal else "first"
        return f"{self.backbone.summary()}; {len(labels)} classes ({shown}) by the {token} token"
