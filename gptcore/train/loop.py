"""The training loop."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gptkernels
import torch
from torch import Tensor

from gptcore.data.prepare import read_report
from gptcore.data.token_file import TokenFile
from gptcore.models import GPT
from gptcore.tokenizer import Tokenizer
from gptcore.train.checkpoint import STATE, load_run, save_run
from gptcore.train.config import TrainConfig

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    """Optimizer steps done, over all its parts."""
    val_loss: float
    """Nats per token on the whole validation text; NaN when interrupted."""
    unigram_entropy: float
    """What a model that only knows how often each token comes would score."""
    tokens_per_second: float
    """Median over the steps of this part."""
    peak_memory: int
    """Bytes: on a GPU the most that tensors took, on a CPU the most that the process has taken so far."""
    interrupted: bool


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: got {name!r}, which is not usable here ({str(error).splitlines()[0]})") from error
    return torch.device(name)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products: without them autocast only costs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("sve_bf16"))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has taken at most: of the GPU's memory there, of the machine's on a CPU (0: not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


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


@torch.no_grad()
def evaluate(model: GPT, tokens: TokenFile, batch_size: int, limit: int | None, device: torch.device) -> float:
    """Mean nats per token over the first `limit` windows of `tokens` (None: all of them)."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for x, y in tokens.windows(model.config.context, batch_size):
        total += float(model.loss(x.to(device), y.to(device))) * y.numel()
        count += y.numel()
        if limit is not None and count >= limit * model.config.context:
            break
    model.train(was_training)
    return total / count


@contextmanager
def _stops_at_ctrl_c() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that a step is finished and saved; a second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _prepare_folder(config: TrainConfig) -> None:
    """Makes `out`, or refuses one that is in use."""
    if config.out.exists() and not config.out.is_dir():
        raise FileExistsError(f"out: {config.out} is a file; accepted is a folder")
    held = sorted(p.name for p in config.out.iterdir()) if config.out.is_dir() else []
    if held and not config.resume:
        ours = STATE in held or METRICS in held
        if not ours:
            raise FileExistsError(f"out: {config.out} holds {held[0]!r} and no run; accepted is a new or empty folder")
        if not config.overwrite:
            raise FileExistsError(
                f"out: {config.out} holds another run; --resume continues it, --overwrite replaces it"
            )
    config.out.mkdir(parents=True, exist_ok=True)


def _start_metrics(path: Path, step: int) -> None:
    """Keeps the records up to `step`: a run killed after its checkpoint has written some that come again."""
    kept = []
    if step and path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept))


def _plot(metrics: Path, entropy: float, path: Path) -> None:
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    loss, val_loss = ([(r["step"], r[key]) for r in records if key in r] for key in ("loss", "val_loss"))
    if loss:
        axes.plot(*zip(*loss), linewidth=0.8, alpha=0.6, label="training")
    if val_loss:
        axes.plot(*zip(*val_loss), marker="o", markersize=3, label="validation")
    axes.axhline(entropy, color="grey", linestyle="--", label="unigram entropy")
    axes.legend()
    figure.savefig(path, dpi=120)


def banner(config: TrainConfig, model: GPT, device: torch.device, bf16: bool) -> str:
    """What is about to run, where, and why the other kernels do not."""
    report = gptkernels.report()
    rows = [row for row in report.rows if torch.device(row.device).type == device.type]
    chosen = config.kernels if config.kernels != "auto" else f"auto -> {', '.join(dict.fromkeys(r.auto for r in rows))}"
    lines = [
        f"model    {model.num_parameters() / 1e6:.1f} M parameters, context {model.config.context}, {config.preset}",
        f"device   {device}, {'bf16 autocast' if bf16 else 'fp32'}",
        f"kernels  {chosen}",
    ]
    if config.kernels == "auto" and rows:
        lines += [f"         {name} not used: {reason}" for name, reason in rows[0].unavailable.items()]
    return "\n".join(lines)


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Trains a GPT as `config` says and leaves it, with its curves and a checkpoint, in ``config.out``.

    Writes ``model.safetensors`` with ``config.json`` and ``tokenizer.json`` (`GPT.from_pretrained` loads the folder),
    ``training.safetensors`` (for ``resume``), ``metrics.jsonl`` (a line a step: loss in nats per token, learning rate,
    gradient norm, tokens per second; and one for each evaluation) and ``loss.png``. Ctrl-C finishes the step and saves.

    Args:
        config: the run.
        progress: show a bar, the banner and samples.

    Raises:
        ValueError: data, checkpoint and configuration do not fit each other; names the argument.
        FileExistsError: ``out`` holds another run.
        BackendUnavailableError: kernels that were chosen explicitly and cannot run here.
        FloatingPointError: the loss is not finite; the last checkpoint stays as it was.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    device = _device(config.device)
    report = read_report(config.data)
    tokenizer = Tokenizer.load(config.data / "tokenizer.json")
    files = {split: TokenFile.open(config.data / f"{split}.bin") for split in ("train", "val")}
    for tokens in files.values():
        if tokens.fingerprint != tokenizer.fingerprint:
            raise ValueError(f"data: {tokens.path} was made with another tokenizer than {config.data}/tokenizer.json")
        next(tokens.windows(config.model(tokenizer.vocab_size).context))  # long enough for one sequence
    with gptkernels.use_backend(config.kernels):  # an explicit choice that cannot run is an error here, not at step 1
        pass
    bf16 = config.precision == "bf16" or (config.precision == "auto" and multiplies_bf16(device))
    torch.manual_seed(config.seed)
    model = GPT(config.model(tokenizer.vocab_size)).to(device)
    optimizer = make_optimizer(model, config, device)
    generator = torch.Generator().manual_seed(config.seed)
    _prepare_folder(config)
    done = load_run(config, model, optimizer, generator, tokenizer.fingerprint) if config.resume else 0
    if config.overwrite:
        for name in (STATE, METRICS, "loss.png", "model.safetensors", "config.json"):
            (config.out / name).unlink(missing_ok=True)
    shutil.copyfile(config.data / "tokenizer.json", config.out / "tokenizer.json")
    metrics = config.out / METRICS
    _start_metrics(metrics, done)

    loss_of = torch.compile(model.loss) if config.compile else model.loss
    console = Console(quiet=not progress, highlight=False)
    console.print(banner(config, model, device, bf16), markup=False)
    speeds: list[float] = []
    val_loss = math.nan

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def one_step() -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=device)
        for _ in range(config.accumulate):
            x, y = files["train"].batch(config.batch_size, model.config.context, generator)
            with autocast():
                loss = loss_of(x.to(device), y.to(device)) / config.accumulate
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if config.clip and norm > config.clip:  # most steps need no pass over the gradients
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
        return total, norm

    def record(step: int, **values: float) -> None:
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def checkpoint(step: int) -> None:
        save_run(config, model, optimizer, generator, step, tokenizer.fingerprint)
        _plot(metrics, report.unigram_entropy, config.out / "loss.png")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not progress)
    model.train()
    with _stops_at_ctrl_c() as stop, bar:
        task = bar.add_task("training", total=config.steps, completed=done)
        while done < config.steps and not stop.is_set():
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(done)
            loss, norm = (float(value) for value in one_step())
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise FloatingPointError(
                    f"step {done + 1}: the loss is {loss}, the gradients' norm {norm}; lr {config.lr} may be too high. "
                    f"{config.out} keeps its last checkpoint"
                )
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            tokens = config.batch_size * config.accumulate * model.config.context
            speeds.append(tokens / (time.perf_counter() - start))
            record(done, loss=loss, lr=config.lr_at(done - 1), grad_norm=norm, tokens_per_second=speeds[-1])
            bar.update(task, completed=done, description=f"loss {loss:.3f}, {speeds[-1]:,.0f} tokens/s")
            last = done == config.steps
            if done % config.eval_interval == 0 or last:
                with autocast():
                    limit = None if last else config.eval_windows
                    val_loss = evaluate(model, files["val"], config.batch_size, limit, device)
                record(done, val_loss=val_loss)
                console.print(f"step {done}: validation loss {val_loss:.3f}", markup=False)
                if config.sample_tokens:
                    ids = torch.tensor([tokenizer.encode(config.sample_prompt)], device=device)
                    ids = model.generate(ids, config.sample_tokens, temperature=0.8, top_k=50, seed=config.seed)
                    console.print("  " + tokenizer.decode(ids[0].tolist()).replace("\n", "\n  "), markup=False)
                if not last:
                    checkpoint(done)
        checkpoint(done)
    interrupted = done < config.steps
    memory = peak_memory(device)
    speed = sorted(speeds)[len(speeds) // 2] if speeds else 0.0
    if interrupted:
        console.print(f"interrupted: step {done} is saved; gptcore train --resume goes on from it", markup=False)
    else:
        console.print(
            f"validation loss {val_loss:.3f} nats per token, unigram entropy {report.unigram_entropy:.3f}; "
            f"{speed:,.0f} tokens/s, peak memory {memory / 2**20:,.0f} MiB; {config.out}/loss.png",
            markup=False,
        )
    val_loss = math.nan if interrupted else val_loss
    return TrainResult(done, val_loss, report.unigram_entropy, speed, memory, interrupted)
