"""What a run computes: data, model and optimizer made from a configuration, and the gradients of a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, Literal, NamedTuple

import gptkernels
import torch
from torch import Tensor

from gptcore.data.prepare import open_split, read_report
from gptcore.data.token_file import TokenFile
from gptcore.layers import Documents
from gptcore.models import GPT
from gptcore.tokenizer import get_tokenizer
from gptcore.train.config import TrainConfig
from gptcore.train.hardware import multiplies_bf16
from gptcore.train.parallel import ALONE, Replica, World, checkpoint_activations, whole

TOKENIZER = "tokenizer.json"


def make_optimizer(model: GPT, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused where PyTorch has it for the device, with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=device.type in ("cuda", "cpu"))


def _no_options(tokens: Tensor) -> dict[str, Any]:
    return {}


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: TokenFile,
    batch_size: int,
    limit: int | None,
    device: torch.device,
    world: World = ALONE,
    options: Callable[[Tensor], dict[str, Any]] = _no_options,
) -> float:
    """Mean nats per token over `limit` windows spread evenly over `tokens` (None, or fewer windows: all of them).

    The processes of `world` share the batches, and all return the same.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    batches = tokens.windows(model.config.context, batch_size, limit)
    while group := list(islice(batches, world.size)):
        # In the last round some may have no batch: they compute another's, for sharded weights are gathered together.
        x, y = group[min(world.rank, len(group) - 1)]
        loss = float(model.loss(x.to(device), y.to(device), **options(x)))
        if world.rank < len(group):
            sums += torch.tensor([loss * y.numel(), y.numel()], dtype=torch.float64)
    model.train(was_training)
    nats, count = world.sum(sums).tolist()
    return nats / count


class Gradients(NamedTuple):
    """What one step's forward and backward found, the same in every process."""

    loss: float
    """Nats per token."""
    norm: float
    """Of all gradients together, before clipping."""
    stop: bool
    """Whether a process was asked to stop."""


class Job:
    """Data, model, optimizer and random states of a run, as they are before its first step. Writes nothing.

    Raises:
        ValueError: data and configuration do not fit each other; names the argument.
        BackendUnavailableError: kernels that were chosen explicitly and cannot run here.
    """

    def __init__(self, config: TrainConfig, world: World, device: torch.device) -> None:
        self.config, self.world, self.device = config, world, device
        self.rows = world.rows(config.batch_size)
        self.batches = config.batches()
        self.report = read_report(config.data)
        self.tokenizer = get_tokenizer(config.data / TOKENIZER)
        self.train, self.val = self._open("train"), self._open("val")
        self.data_digest = f"{self.train.digest()}-{self.val.digest()}"
        """Of the data; see `TokenFile.digest`."""
        self.prompt = self.tokenizer.encode(config.sample_prompt) if config.sample_tokens else []
        if config.sample_tokens and not self.prompt:
            raise ValueError(
                f"sample_prompt: got {config.sample_prompt!r}; accepted is a text of one token or more, "
                "or sample_tokens 0"
            )
        with gptkernels.use_backend(config.kernels):  # one that cannot run is an error here, not at step 1
            pass
        self.bf16 = config.dtype == "bf16" or (config.dtype == "auto" and multiplies_bf16(device))
        torch.manual_seed(config.seed)
        self.model = GPT(config.model(self.tokenizer.vocab_size))
        self.flops_per_token = self.model.flops_per_token(self.model.config.context)
        self.parameters = self.model.num_parameters()
        if config.checkpoint_activations:
            checkpoint_activations(self.model)
        self.replica = Replica(self.model, world, device, config.parallel, config.compile)
        self.optimizer = make_optimizer(self.model, config, device)
        self.generator = torch.Generator().manual_seed(config.seed)
        """Of the data: every process draws the same batches and takes its rows."""
        torch.manual_seed(config.seed + world.rank)  # dropout differs between processes

    @property
    def tokens_per_step(self) -> int:
        return self.batches * self.config.batch_size * self.model.config.context

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def loss_options(self, tokens: Tensor) -> dict[str, Any]:
        """What the model's loss is told about a batch ``(B, T)``, still on the CPU, besides its tokens."""
        if not self.config.document_mask:
            return {}
        return {"documents": Documents.of(tokens, self.tokenizer.eot_token).to(self.device)}

    def gradients(self, stopped: Callable[[], bool] = lambda: False) -> Gradients:
        """Forward and backward of one step's batches; leaves the clipped gradients in the parameters."""
        total = torch.zeros((), device=self.device)
        for index in range(self.batches):
            batch = self.train.batch(self.config.batch_size, self.model.config.context, self.generator, self.rows)
            options = self.loss_options(batch[0])
            x, y = (part.to(self.device) for part in batch)
            with self.replica.gradients_stay(here=index < self.batches - 1):
                with self.autocast():
                    loss = self.replica.loss(x, y, **options) / self.batches
                loss.backward()
            total += loss.detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self.config.clip and norm > self.config.clip:  # most steps need no pass over the gradients
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, norm)
        sums = torch.stack([total / self.world.size, torch.full_like(total, stopped())])
        loss, stop = self.world.sum(sums).tolist()
        return Gradients(loss, float(norm), stop > 0)

    def update(self, lr: float) -> None:
        """The optimizer's step with the gradients that are there, which it uses up."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def validation_loss(self, limit: int | None) -> float:
        """See `evaluate`; nats per token of the validation text."""
        with self.autocast():
            return evaluate(
                self.model, self.val, self.config.batch_size, limit, self.device, self.world, self.loss_options
            )

    def sample(self) -> str:
        """What the model makes of the prompt; empty in processes that have no part in it."""
        if not self.config.sample_tokens or not (self.world.is_main or self.replica.sharded):
            return ""
        ids = torch.tensor([self.prompt[-self.model.config.context :]], device=self.device)
        ids = self.model.generate(
            ids, self.config.sample_tokens, temperature=0.8, top_k=50, seed=self.config.seed
        )  # fmt: skip
        return self.tokenizer.decode(ids[0].tolist())

    def _open(self, split: Literal["train", "val"]) -> TokenFile:
        """The tokens of a split, which must be the tokenizer's and enough for one sequence."""
        tokens = open_split(self.config.data, split)
        if tokens.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(f"data: {tokens.path} was made with another tokenizer than {self.config.data / TOKENIZER}")
        next(tokens.windows(self.config.model(self.tokenizer.vocab_size).context))
        return tokens
