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
from gptcore.nn import Kernels
from gptcore.train import step as training_step
from gptcore.train.checkpoint import Checkpoint, newest, publish_model, record_evaluation, save_checkpoint
from gptcore.train.config import RunConfig
from gptcore.train.display import Display, shown
from gptcore.train.guard import Guard
from gptcore.train.hardware import model_flops_utilization, peak_flops, peak_memory
from gptcore.train.metrics import PLOT, MetricsLog
from gptcore.train.parallel import World, processes
from gptcore.train.run_folder import check_folder, locked_folder, start_folder
from gptcore.train.state import Progress, TrainState
from gptcore.weights import WeightsError


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    steps: int
    """Optimizer steps done, those before a resume included."""
    val_loss: float
    """Nats per target on the `RunConfig.eval_windows` rows of each evaluation; NaN if the run was interrupted."""
    val_loss_full: float
    """Nats per target on all validation data; NaN if the run was interrupted."""
    values: dict[str, float]
    """What the last evaluation measured on all validation data: ``loss``, and what else the task does, such as ``accuracy``."""
    baseline: float
    """Loss of a trivial model; for text, one that only knows the frequency of each token. NaN if the task has none."""
    tokens_per_second: float
    """Median over the steps since the start or resume, all processes together; 0 if there were none."""
    mfu: float
    """Model FLOPs utilization at that speed; see `gptcore.train.hardware.model_flops_utilization`."""
    peak_memory: int
    """Bytes: on a GPU of tensors, on a CPU of the whole process."""
    interrupted: bool


@contextmanager
def _stops_at_signals() -> Iterator[threading.Event]:
    """Makes the first Ctrl-C, SIGTERM or SIGHUP set the event, so that the step is finished and saved; a later one acts as usual.

    Signals within a second of the first count as the same one: a closing terminal sends SIGHUP twice, and torchrun forwards
    signals that its processes have received already. A SIGHUP that ``nohup`` ignores stays ignored.
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


def banner(state: TrainState, peak: str) -> str:
    """Returns three lines for people: the model, the device, and the kernels that run."""
    config, device, world = state.config, state.device, state.world
    several = f", {world.size} processes, {'fsdp' if state.replica.sharded else 'ddp'}" if world.size > 1 else ""
    size = f"{state.parameters / 1e6:.1f} M parameters, context {state.model.config.context}"
    if state.trained != state.parameters:
        size += f"; {state.trained / 1e6:.2f} M are trained"
    return (
        f"model    {config.title()}, {size}\n"
        f"device   {device}, {'bf16 autocast' if state.bf16 else 'fp32'}{several}; peak {peak}\n"
        f"kernels  {kernels_that_run(config.kernels, device)}"
    )


def kernels_that_run(kernels: Kernels, device: torch.device) -> str:
    """Returns the name of the kernels that run on `device` with this choice, such as ``native (C++, avx512_bf16)``."""
    report = gptkernels.report()
    backend = kernels
    if kernels == "auto":
        taken = {row.auto for row in report.rows if torch.device(row.device).type == device.type}
        backend = next((name for name in ("triton", "native") if name in taken), "reference")
    names = {"native": f"native (C++, {report.native_level})", "reference": "reference (PyTorch)"}
    return names.get(backend, backend)


def train(config: RunConfig, *, progress: bool = True) -> TrainResult:
    """Trains a model and leaves it, with its curves and checkpoints, in ``config.out``.

    The folder then holds

    - ``model.safetensors``, ``config.json`` and ``tokenizer.json``: `gptcore.models.from_pretrained` loads the folder
    - ``checkpoints/``: see `gptcore.train.checkpoint`
    - ``metrics.jsonl``: a line for each step (loss in nats per target, learning rate, gradient norm, tokens so far) and for
      each evaluation (``val_loss`` and what else the task measures, on the same `eval_windows` rows each time; after the last
      step also ``val_loss_full``, ..., on all validation data)
    - ``timings.jsonl``: seconds, tokens per second, MFU, peak memory
    - ``loss.png`` and ``config.yaml``

    Ctrl-C, SIGTERM and SIGHUP finish the step and save it. A step is saved, then evaluated, then shown. Errors in what is
    only shown (lines, the live view, samples, ``loss.png``, TensorBoard) never end a run: each is reported once, on the
    standard error.

    Processes that `torchrun` started train together: each takes its rows of every batch, and the first one writes.

    Args:
        config: the options of the run.
        progress: show the banner, a live view or lines, and samples.

    Raises:
        ValueError: data, checkpoint and configuration do not fit; names the argument.
        WeightsError: a checkpoint is damaged, or there is none to resume from; names the file.
        FileExistsError: ``out`` holds another run.
        BlockingIOError: another process trains in ``out``; says which.
        OSError: a checkpoint or metrics.jsonl could not be written; the earlier checkpoints stay.
        BackendUnavailableError: an explicit choice of kernels that cannot run here.
        MissingPackageError: TensorBoard, or a package that the data's tokenizer needs, is not installed; nothing is written.
        FloatingPointError: the loss is not finite; the last checkpoint stays as it was.
    """
    with processes(config.device) as (world, device), locked_folder(config.out, world):
        return _train(config, world, device, progress and world.is_main)


def _find_checkpoint(config: RunConfig, say: Callable[[str], None]) -> Checkpoint | None:
    """Returns the checkpoint to resume from; None to start a new run."""
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


def _train(config: RunConfig, world: World, device: torch.device, shown: bool) -> TrainResult:
    if config.tensorboard:
        _extras.load("tensorboard", "tensorboard")  # an error comes before anything is read or written
    guard = Guard()
    say = Display(shown, config.steps, guard=guard).say
    checkpoint = _find_checkpoint(config, say)
    given, state = config, TrainState(config, world, device)
    config, progress = state.config, Progress()
    if checkpoint:
        checkpoint.check(state)
        progress = checkpoint.progress
        finished = progress.step >= config.steps and not progress.awaits_evaluation(config)
        if progress.step > config.steps or (finished and config.resume == "always"):
            raise ValueError(
                f"steps: got {config.steps}; the run in {config.out} has done {progress.step}, accepted are more"
            )
        checkpoint.restore(state)
    world.barrier()  # every process has read before one writes
    log = None
    if world.is_main:
        start_folder(given, state.task, resumed=checkpoint is not None)
        evaluated = not progress.awaits_evaluation(config)
        log = MetricsLog(config.out, progress.step, evaluated, config.tensorboard, guard)
        if checkpoint:
            publish_model(checkpoint.folder, config.out)
    try:
        return _Run(state, progress, log, Display(shown, config.steps, progress.step, guard)).go()
    finally:
        if log:
            log.close()


class _Run:
    """Takes a run from `progress` to the last step."""

    def __init__(self, state: TrainState, progress: Progress, log: MetricsLog | None, display: Display) -> None:
        self.state, self.config = state, state.config
        self.progress = progress
        self.log = log
        self.display = display
        dtype = torch.bfloat16 if state.bf16 else torch.float32
        self.peak, peak = peak_flops(state.device, dtype)
        self.peak *= state.world.size
        self.display.say("\n".join([banner(state, peak), *state.task.remarks]))
        self.values: dict[str, float] = {}
        self.speeds: list[float] = []
        self.utilizations: list[float] = []

    def go(self) -> TrainResult:
        steps = self.config.steps
        due = self.progress.awaits_evaluation(self.config)  # the run had ended between saving and evaluating
        if self.progress.step >= steps and not due:
            self.display.say(f"{self.config.out} has done its {steps} steps: nothing left to do")
        elif self.progress.step:
            self.display.say(f"going on after step {self.progress.step}")
        self.state.model.train()
        stop = False
        with _stops_at_signals() as stopped, self.display:
            if due:
                self._evaluate()
                self._show(sample=True)
            while self.progress.step < steps and not stop:
                stop = self._step(stopped.is_set)
                due = self.progress.awaits_evaluation(self.config)
                if due or stop:
                    self._save()
                if due:
                    self._evaluate()
                if due or stop:
                    self._show(sample=due)
        return self._result(interrupted=self.progress.step < steps)

    def _step(self, stopped: Callable[[], bool]) -> bool:
        """Does one optimizer step. Returns whether to stop after it."""
        progress = self.progress
        start = time.perf_counter()
        lr = self.config.lr_at(progress.step)
        done = progress.step + 1
        found = training_step.gradients(self.state, progress.step, stopped)
        loss, norm = found.loss, found.norm
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {done}: the loss is {loss}, the gradients' norm {norm}; lr {self.config.lr} may be too high. "
                f"{self.config.out} keeps its last checkpoint"
            )
        training_step.update(self.state, lr)
        tokens = progress.tokens + found.tokens
        self.progress = dataclasses.replace(progress, step=done, tokens=tokens, val_loss_full=None)
        seconds = time.perf_counter() - start
        speed = found.tokens / seconds
        mfu = model_flops_utilization(found.flops / seconds, self.peak)
        self.speeds.append(speed)
        self.utilizations.append(mfu)
        if self.log:
            self.log.metrics(done, loss=loss, lr=lr, grad_norm=norm, tokens=self.progress.tokens)
            memory = peak_memory(self.state.device)
            self.log.timings(done, seconds=seconds, tokens_per_second=speed, mfu=mfu, peak_memory=memory)
        self.display.step(done, loss, seconds, speed, mfu)
        return found.stop

    def _save(self) -> None:
        if self.log:
            self.log.sync()  # a checkpoint never exists without its lines
        save_checkpoint(self.state, self.progress)

    def _evaluate(self) -> None:
        """Evaluates a saved step and adds the result to its checkpoint."""
        step, best = self.progress.step, self.progress.best_val_loss
        self.values = training_step.evaluate(self.state, self.config.eval_windows)
        self.display.evaluated(step, self.values)
        found = {f"val_{name}": value for name, value in self.values.items()}
        if step == self.config.steps:
            self.values = training_step.evaluate(self.state, None)
            found |= {f"val_{name}_full": value for name, value in self.values.items()}
        kept = {name: value for name, value in found.items() if name in ("val_loss", "val_loss_full")}
        self.progress = dataclasses.replace(self.progress, evaluated=step, **kept)
        if best is None or found["val_loss"] < best:
            self.progress = dataclasses.replace(self.progress, best_step=step, best_val_loss=found["val_loss"])
        if self.log:
            self.log.metrics(step, **found)
            self.log.sync()
            record_evaluation(self.config.out, self.progress, self.config)

    def _show(self, sample: bool) -> None:
        """Shows a sample and draws the curve; errors in it do not end the run."""
        guard = self.display.guard
        if sample:
            with guard("the sample"):
                self.display.sampled(self.state.sample())
        if self.log:
            with guard(PLOT):
                self.log.plot(self.state.task.baseline)

    def _result(self, interrupted: bool) -> TrainResult:
        out, step = self.config.out, self.progress.step
        speed = median(self.speeds) if self.speeds else 0.0
        mfu = median(self.utilizations) if self.utilizations else 0.0
        memory = peak_memory(self.state.device)
        baseline = self.state.task.baseline
        val_loss, full = self.progress.val_loss, self.progress.val_loss_full
        if interrupted or val_loss is None or full is None:
            val_loss = full = math.nan
        if interrupted:
            self.display.say(f"interrupted: step {step} is saved; the same command with --resume auto goes on from it")
        else:
            others = "".join(f", {shown(name, value)}" for name, value in self.values.items() if name != "loss")
            compared = f"; {baseline[0]} {baseline[1]:.3f}" if baseline else ""
            self.display.say(
                f"validation loss {full:.3f} nats per target{others} on all validation data{compared}\n"
                f"{speed:,.0f} tokens/s, MFU {mfu:.0%}, peak memory {memory / 2**20:,.0f} MiB; curve in {out / PLOT}"
            )
        return TrainResult(
            steps=step,
            val_loss=val_loss,
            val_loss_full=full,
            values={} if interrupted else self.values,
            baseline=baseline[1] if baseline else math.nan,
            tokens_per_second=speed,
            mfu=mfu,
            peak_memory=memory,
            interrupted=interrupted,
        )
