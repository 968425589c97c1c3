"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import gptkernels
import torch

from gptcore import _extras
from gptcore.train.checkpoint import Checkpoint, Position, newest, publish_model, record_evaluation, save_checkpoint
from gptcore.train.config import TrainConfig
from gptcore.train.display import Display
from gptcore.train.folder import check_folder, locked_folder, start_folder
from gptcore.train.guard import Guard
from gptcore.train.hardware import model_flops_utilization, peak_flops, peak_memory
from gptcore.train.job import Job
from gptcore.train.parallel import World, processes
from gptcore.train.records import PLOT, Records
from gptcore.weights import WeightsError


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    """Optimizer steps done, over all its parts."""
    val_loss: float
    """Nats per token on the sequences of every evaluation, `TrainConfig.eval_windows`; NaN when interrupted."""
    val_loss_full: float
    """Nats per token on the whole validation text; NaN when interrupted."""
    unigram_entropy: float
    """What a model that only knows how often each token comes would score."""
    tokens_per_second: float
    """Median over the steps of this part, of all processes together; 0 if it had none."""
    mfu: float
    """Model FLOPs utilization at that speed; see `gptcore.train.hardware.model_flops_utilization`."""
    peak_memory: int
    """Bytes: on a GPU the most that tensors took, on a CPU the most that the process has taken so far."""
    interrupted: bool


@contextmanager
def _stops_at_signals() -> Iterator[threading.Event]:
    """The first Ctrl-C, SIGTERM or SIGHUP sets the event, so that a step is finished and saved; a later one acts as usual.

    Those that follow within a second are the first one again: a terminal that closes sends SIGHUP twice, and torchrun
    hands on what its processes have got already. A SIGHUP that is ignored, by ``nohup``, stays so.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    previous: dict[int, Any] = {}
    first: float | None = None

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(number: int, _: Any) -> None:
        nonlocal first
        now = time.monotonic()
        first = now if first is None else first
        event.set()
        if now - first > 1:
            restore()
            signal.raise_signal(number)

    for number in numbers:
        previous[number] = signal.signal(number, stop)
    try:
        yield event
    finally:
        restore()


def banner(job: Job, peak: str) -> str:
    """What is about to run, where, and why the other kernels do not."""
    config, device, world = job.config, job.device, job.world
    report = gptkernels.report()
    rows = [row for row in report.rows if torch.device(row.device).type == device.type]
    chosen = config.kernels if config.kernels != "auto" else f"auto -> {', '.join(dict.fromkeys(r.auto for r in rows))}"
    several = f", {world.size} processes, {'fsdp' if job.replica.sharded else 'ddp'}" if world.size > 1 else ""
    lines = [
        f"model    {job.parameters / 1e6:.1f} M parameters, context {job.model.config.context}, {config.preset}",
        f"device   {device}, {'bf16 autocast' if job.bf16 else 'fp32'}{several}; peak {peak}",
        f"kernels  {chosen}",
    ]
    if config.kernels == "auto" and rows:
        lines += [f"         {name} not used: {reason}" for name, reason in rows[0].unavailable.items()]
    return "\n".join(lines)


def train(config: TrainConfig, *, progress: bool = True) -> TrainResult:
    """Trains a GPT as `config` says and leaves it, with its curves and checkpoints, in ``config.out``.

    Writes ``model.safetensors`` with ``config.json`` and ``tokenizer.json`` (`GPT.from_pretrained` loads the folder),
    ``checkpoints/`` (see `gptcore.train.checkpoint`), ``metrics.jsonl`` (a line a step: loss in nats per token, learning
    rate, gradient norm, tokens so far; and one for each evaluation: ``val_loss`` on the same `eval_windows` sequences each
    time, after the last step also ``val_loss_full`` on the whole validation text), ``timings.jsonl`` (seconds, tokens per
    second, MFU, peak memory), ``loss.png`` and ``config.yaml``. Ctrl-C, SIGTERM and SIGHUP finish the step and save.

    A step is saved before it is evaluated, and evaluated before anything is shown. What is only shown (lines, the live
    view, samples, ``loss.png``, TensorBoard) never ends a run: what fails is said once, on the standard error.

    Processes that `torchrun` started train together: each takes its rows of every batch, the first one writes.

    Args:
        config: the run.
        progress: show the banner, a live view or lines, and samples.

    Raises:
        ValueError: data, checkpoint and configuration do not fit each other; names the argument.
        WeightsError: a checkpoint that is damaged, or none where one must be; names the file.
        FileExistsError: ``out`` holds another run.
        BlockingIOError: another process works in ``out``; says which.
        OSError: a checkpoint or metrics.jsonl could not be written; the earlier checkpoints stay.
        BackendUnavailableError: kernels that were chosen explicitly and cannot run here.
        MissingPackageError: TensorBoard, or what the data's tokenizer needs, is not installed; nothing is written then.
        FloatingPointError: the loss is not finite; the last checkpoint stays as it was.
    """
    with processes(config.device) as (world, device), locked_folder(config.out, world):
        return _train(config, world, device, progress and world.is_main)


def _find_checkpoint(config: TrainConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """What to go on from; None starts anew."""
    holds_run = check_folder(config.out)
    if config.resume == "never":
        if holds_run and not config.overwrite:
            raise FileExistsError(
                f"out: {config.out} holds another run; --resume auto continues it, --overwrite replaces it"
            )
        return None
    found = newest(config.out, config.resume == "auto", say)
    if found is None and config.resume == "always":
        raise WeightsError(
            f"{config.out}: holds no checkpoint; nothing to resume (--resume auto starts if there is none)"
        )
    return found


def _train(config: TrainConfig, world: World, device: torch.device, shown: bool) -> TrainResult:
    if config.tensorboard:
        _extras.load("tensorboard", "tensorboard")  # before anything is read or written
    guard = Guard()
    say = Display(shown, config.steps, guard=guard).say
    checkpoint = _find_checkpoint(config, say)
    job = Job(config, world, device)
    position = Position()
    if checkpoint:
        checkpoint.check(config, job.tokenizer.fingerprint, job.data_digest)
        position = checkpoint.position
        finished = position.step >= config.steps and not position.awaits_evaluation(config)
        if position.step > config.steps or (finished and config.resume == "always"):
            raise ValueError(
                f"steps: got {config.steps}; the run in {config.out} has done {position.step}, accepted are more"
            )
        checkpoint.restore(job)
    world.barrier()  # all have read before anything is written
    records = None
    if world.is_main:
        start_folder(config, goes_on=checkpoint is not None)
        evaluated = not position.awaits_evaluation(config)
        records = Records(config.out, position.step, evaluated, config.tensorboard, guard)
        if checkpoint:
            publish_model(checkpoint.folder, config.out)
    try:
        return _Run(job, position, records, Display(shown, config.steps, position.step, guard)).go()
    finally:
        if records:
            records.close()


class _Run:
    """A job on its way from `position` to the last step."""

    def __init__(self, job: Job, position: Position, records: Records | None, display: Display) -> None:
        self.job, self.config = job, job.config
        self.position = position
        self.records = records
        self.display = display
        dtype = torch.bfloat16 if job.bf16 else torch.float32
        self.peak, peak = peak_flops(job.device, dtype)
        self.peak *= job.world.size
        self.display.say(banner(job, peak))
        self.speeds: list[float] = []

    def go(self) -> TrainResult:
        job, steps = self.job, self.config.steps
        due = self.position.awaits_evaluation(self.config)  # the run was ended between saving and evaluating
        if self.position.step >= steps and not due:
            self.display.say(f"{self.config.out} has done its {steps} steps: nothing left to do")
        elif self.position.step:
            self.display.say(f"going on after step {self.position.step}")
        job.model.train()
        stop = False
        with _stops_at_signals() as stopped, self.display:
            if due:
                self._evaluate()
                self._show(sample=True)
            while self.position.step < steps and not stop:
                stop = self._step(stopped.is_set)
                due = self.position.awaits_evaluation(self.config)
                if due or stop:
                    self._save()
                if due:
                    self._evaluate()
                if due or stop:
                    self._show(sample=due)
        return self._result(interrupted=self.position.step < steps)

    def _step(self, stopped: Callable[[], bool]) -> bool:
        """One optimizer step; whether it is to be the last for now."""
        job, position = self.job, self.position
        start = time.perf_counter()
        lr = self.config.lr_at(position.step)
        done = position.step + 1
        loss, norm, stop = job.gradients(stopped)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {done}: the loss is {loss}, the gradients' norm {norm}; lr {self.config.lr} may be too high. "
                f"{self.config.out} keeps its last checkpoint"
            )
        job.update(lr)
        tokens = position.tokens + job.tokens_per_step
        self.position = dataclasses.replace(position, step=done, tokens=tokens, val_loss_full=None)
        seconds = time.perf_counter() - start
        speed = job.tokens_per_step / seconds
        mfu = model_flops_utilization(speed, job.flops_per_token, self.peak)
        self.speeds.append(speed)
        if self.records:
            self.records.metrics(done, loss=loss, lr=lr, grad_norm=norm, tokens=self.position.tokens)
            memory = peak_memory(job.device)
            self.records.timings(done, seconds=seconds, tokens_per_second=speed, mfu=mfu, peak_memory=memory)
        self.display.step(done, loss, seconds, speed, mfu)
        return stop

    def _save(self) -> None:
        if self.records:
            self.records.sync()  # a checkpoint's lines are there whenever it is
        save_checkpoint(self.job, self.position)

    def _evaluate(self) -> None:
        """Evaluates a step that is saved, and adds the result to its checkpoint."""
        step, best = self.position.step, self.position.best_val_loss
        found = {"val_loss": self.job.validation_loss(self.config.eval_windows)}
        if step == self.config.steps:
            found["val_loss_full"] = self.job.validation_loss(None)
        self.position = dataclasses.replace(self.position, evaluated=step, **found)
        if best is None or found["val_loss"] < best:
            self.position = dataclasses.replace(self.position, best_step=step, best_val_loss=found["val_loss"])
        if self.records:
            self.records.metrics(step, **found)
            self.records.sync()
            record_evaluation(self.config.out, self.position, self.config)
        self.display.evaluated(step, found["val_loss"])

    def _show(self, sample: bool) -> None:
        """What a person looks at: comes last, and may fail."""
        guard = self.display.guard
        if sample:
            with guard("the sample"):
                self.display.sampled(self.job.sample())
        if self.records:
            with guard(PLOT):
                self.records.plot(self.job.report.unigram_entropy)

    def _result(self, interrupted: bool) -> TrainResult:
        job, out, step = self.job, self.config.out, self.position.step
        speed = median(self.speeds) if self.speeds else 0.0
        mfu = model_flops_utilization(speed, job.flops_per_token, self.peak)
        memory = peak_memory(job.device)
        entropy = job.report.unigram_entropy
        val_loss, full = self.position.val_loss, self.position.val_loss_full
        if interrupted or val_loss is None or full is None:
            val_loss = full = math.nan
        if interrupted:
            self.display.say(f"interrupted: step {step} is saved; gptcore train --resume auto goes on from it")
        else:
            self.display.say(
                f"validation loss {full:.3f} nats per token of the whole text, unigram entropy {entropy:.3f}; "
                f"{speed:,.0f} tokens/s, MFU {mfu:.0%}, peak memory {memory / 2**20:,.0f} MiB; {out}/loss.png"
            )
        return TrainResult(step, val_loss, full, entropy, speed, mfu, memory, interrupted)
