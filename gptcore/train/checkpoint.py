"""Checkpoints: folders from which training resumes exactly, and from which the model loads.

``out/checkpoints/step-00000300/`` holds

| file | contents |
| --- | --- |
| ``model.safetensors``, ``config.json``, ``tokenizer.json`` | the model; `gptcore.models.from_pretrained` loads the folder |
| ``adapter_model.safetensors``, ``adapter_config.json`` | instead of ``model.safetensors``: the adapters, if LoRA is trained |
| ``optimizer.safetensors`` | ``KEY.NAME``: the optimizer's tensors for each trained parameter (AdamW: ``exp_avg``, ...) |
| ``optimizer/`` | the same in shards, one of each process, if the model was sharded |
| ``random.safetensors`` | random states: ``data`` of the batches; ``cpu.RANK`` and ``cuda.RANK`` of PyTorch in each process |
| ``state.json`` | step, tokens, losses, configuration, digests of tokenizer and data, and the size of each other file |

The folder is written under a temporary name, synced to the disk, and then renamed: a folder with the final name is complete.
The evaluation of the step comes later and is added to ``state.json``: an interrupted evaluation does not lose the step.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptcore._files import atomic_writer, link_or_copy, publish_folder, remove_folder
from gptcore.nn import has_lora
from gptcore.text.tokenizer import TOKENIZER
from gptcore.train.config import RunConfig
from gptcore.train.optimizers import initialise_state
from gptcore.train.parallel import shard_like, whole
from gptcore.train.state import Progress, TrainState
from gptcore.weights import CONFIG, WEIGHTS, WeightsError, check_state, description, read_tensors
from gptcore.weights.adapter import adapter_state, read_adapter, save_adapter
from gptcore.weights.names import ADAPTER, ADAPTER_CONFIG

FOLDER = "checkpoints"
STATE, OPTIMIZER, SHARDS, RANDOM = "state.json", "optimizer.safetensors", "optimizer", "random.safetensors"
_FORMAT = 2
_OLD_FORMAT = 1  # has no digest of the data, and its losses were measured on other rows
# Options that a resumed run may change: they decide where and how it computes, not what.
_CHANGEABLE = {
    "data",
    "out",
    "kernels",
    "dtype",
    "compile",
    "device",
    "parallel",
    "checkpoint_activations",
    "tensorboard",
}
_CHANGEABLE |= {"steps", "eval_interval", "keep", "keep_best"}
_CHANGEABLE |= {"accumulate"}  # the number of micro-batches that follows from them may not change
# Options that runs of earlier versions did not have, with the values that they had in effect.
_EARLIER_DEFAULTS = {"model": "gpt", "task": "language_model", "optimizer": "adamw", "schedule": "cosine"}
_EARLIER_DEFAULTS |= {"muon_lr": 0.02, "momentum": 0.95}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all exist and have the right sizes."""

    folder: Path
    progress: Progress
    config: dict[str, Any]
    fingerprint: str
    data_digest: str | None
    """Digest of the token files; None: not known."""
    base_digest: str | None
    """Digest of the base's weights; None: the run trains a new model."""

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """Reads ``state.json`` and checks the other files' sizes and headers; reads no tensors.

        Raises:
            WeightsError: a file is missing, damaged or a pickle; names it.
        """
        path = folder / STATE
        try:
            state = json.loads(path.read_bytes())
            if (found := state["format"]) not in (_FORMAT, _OLD_FORMAT):
                raise WeightsError(f"{path}: is of format {found!r}; accepted are {_OLD_FORMAT} and {_FORMAT}")
            progress, files = Progress(**state["position"]), dict(state["files"])
            if found == _OLD_FORMAT:
                progress = Progress(progress.step, progress.tokens)
            config, fingerprint = dict(state["config"]), str(state["fingerprint"])
            data_digest, base_digest = state.get("data_digest"), state.get("base_digest")
        except FileNotFoundError as error:
            raise WeightsError(f"{path}: there is no such file") from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, WeightsError):
                raise
            raise WeightsError(f"{path}: is damaged or no checkpoint of gptcore train ({error!r})") from error
        for name, size in files.items():
            file = folder / name
            if not file.is_file():
                pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl"))
                instead = f"; {pickles[0]} is a pickle, which can run code when it is read" if pickles else ""
                raise WeightsError(f"{file}: there is no such file{instead}")
            if file.suffix == ".safetensors":
                _refuse_pickle(file)
            if (actual := file.stat().st_size) != size:
                raise WeightsError(f"{file}: is damaged: it has {actual} bytes of {size}")
        return cls(folder, progress, config, fingerprint, data_digest, base_digest)

    def check(self, state: TrainState) -> None:
        """Checks that the run of `state` can continue.

        Raises:
            ValueError: the configuration, tokenizer, data or base differs; names the field and both values.
        """
        config, task = state.config, state.task
        for name, value in _fixed(config).items():
            if (saved := (_EARLIER_DEFAULTS | self.config).get(name)) != value:
                raise ValueError(f"{name}: got {value!r}; accepted when resuming is the run's, {saved!r}")
        if self.fingerprint != task.fingerprint:
            raise ValueError(f"data: {config.data} was made with another tokenizer than the run in {config.out}")
        if self.data_digest not in (None, task.digest):
            raise ValueError(
                f"data: {config.data} ({task.digest}) differs from what the run in {config.out} was trained on, "
                f"{self.config.get('data')} ({self.data_digest}); accepted when resuming is the same, in any place"
            )
        if self.base_digest != state.base_digest:
            raise ValueError(
                f"model: the base ({state.base_digest}) has other weights than the one that the run in {config.out} began with, "
                f"{self.config.get('model')} ({self.base_digest}); accepted when resuming is the same, in any place"
            )

    def restore(self, state: TrainState) -> None:
        """Loads weights, the optimizer's tensors and random states into `state`; changes nothing if they do not fit the model.

        Processes that the checkpoint has no random state for keep their own.

        Raises:
            WeightsError: a file is damaged, or a tensor is missing, unknown or of another shape.
        """
        model, source = state.model, self.folder / WEIGHTS
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        adapters: dict[str, Tensor] | None = None
        if has_lora(model):
            adapters = adapter_state(model, read_adapter(self.folder))
        else:
            check_state(_shapes(source), weights, source, type(model).__name__)
        sharded = (self.folder / SHARDS).is_dir()
        source = self.folder / SHARDS if sharded else self.folder / OPTIMIZER
        initialise_state(state.optimizer)
        kept = _optimizer_tensors(state)
        found = _shapes(*(sorted(source.glob("*.safetensors")) if sharded else [source]))
        for name, tensor in kept.items():
            if name not in found:
                raise WeightsError(f"{source}: {name} is missing")
            if not sharded and found[name].shape != tensor.shape:
                raise WeightsError(
                    f"{source}: {name} has shape {tuple(found[name].shape)}; accepted is {tuple(tensor.shape)}"
                )
        if extra := sorted(set(found) - set(kept)):
            raise WeightsError(f"{source}: {extra[0]} belongs to no parameter")
        random = read_tensors(self.folder / RANDOM)
        if "data" not in random:
            raise WeightsError(f"{self.folder / RANDOM}: data is missing")
        if adapters is None:
            _load(weights, self.folder / WEIGHTS)
        else:
            for name, tensor in adapters.items():
                weights[name].copy_(shard_like(tensor, weights[name]))
        _load(kept, source)
        state.generator.set_state(random["data"])
        if (own := random.get(f"cpu.{state.world.rank}")) is not None:
            torch.set_rng_state(own)
        if state.device.type == "cuda" and (own := random.get(f"cuda.{state.world.rank}")) is not None:
            torch.cuda.set_rng_state(own, state.device)


def checkpoints(out: Path) -> list[Path]:
    """Returns the folders of a run's checkpoints, the newest first."""
    return sorted((p for p in (out / FOLDER).glob("step-*") if p.is_dir()), reverse=True)


def newest(out: Path, fall_back: bool, warn: Any = print) -> Checkpoint | None:
    """Returns the newest checkpoint of a run; None if there is none.

    With `fall_back` it skips damaged checkpoints and calls `warn` with the reason.

    Raises:
        WeightsError: the newest checkpoint is damaged, or with `fall_back` all of them; names the file.
    """
    first: WeightsError | None = None
    for folder in checkpoints(out):
        try:
            return Checkpoint.read(folder)
        except WeightsError as error:
            if not fall_back:
                raise WeightsError(f"{error}; --resume auto goes on from the checkpoint before it") from error
            warn(f"warning: {error}; going on from the checkpoint before it")
            first = first or error
    if first:
        raise first
    return None


def save_checkpoint(state: TrainState, progress: Progress) -> Path:
    """Writes a checkpoint, publishes its model in `out`, and then deletes checkpoints that are no longer kept.

    Raises:
        OSError: the checkpoint could not be written (a full disk); the earlier ones stay.
    """
    config, out = state.config, state.config.out
    folder = out / FOLDER / _name(progress.step)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        if state.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        state.world.barrier()
        _write(state, temporary)
        state.world.barrier()
        if state.world.is_main:
            _describe(state, progress, temporary)
            publish_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint of step {progress.step} could not be written ({error}); {out / FOLDER} keeps the earlier ones"
        ) from error
    finally:
        if state.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    if state.world.is_main:
        publish_model(folder, out)
        _prune(out, progress, config.keep, config.keep_best)
    return folder


def record_evaluation(out: Path, progress: Progress, config: RunConfig) -> None:
    """Adds the evaluation in `progress` to the checkpoint of its step, and deletes checkpoints that are no longer kept.

    Raises:
        OSError: it could not be written; the checkpoint is unchanged, and a resumed run evaluates it.
    """
    path = out / FOLDER / _name(progress.step) / STATE
    try:
        described = json.loads(path.read_bytes()) | {"position": dataclasses.asdict(progress)}
        with atomic_writer(path) as file:
            file.write(json.dumps(described, indent=2).encode())
    except OSError as error:
        raise OSError(f"the evaluation of step {progress.step} could not be written ({error})") from error
    _prune(out, progress, config.keep, config.keep_best)


def publish_model(folder: Path, out: Path) -> None:
    """Puts a checkpoint's model into `out`. Each file appears by a rename; within a run only the weights change."""
    for name in (TOKENIZER, CONFIG, ADAPTER_CONFIG, ADAPTER, WEIGHTS):
        if (folder / name).is_file():  # the adapter's files or the weights
            link_or_copy(folder / name, out / name)


def _fixed(config: RunConfig) -> dict[str, Any]:
    changeable = _CHANGEABLE | config.changeable | config.task.changeable
    values = {name: value for name, value in config.plain().items() if name not in changeable}
    return values | {"batches of a step": config.batches()}


def _write(state: TrainState, folder: Path) -> None:
    """Writes this process's part of the tensors."""
    main, model = state.world.is_main, state.model
    adapters = has_lora(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {
        name: whole(tensor).detach().cpu()
        for name, tensor in model.state_dict().items()
        if name in trained or not adapters
    }
    if main and adapters:
        assert state.base is not None
        save_adapter(folder, model, state.base, weights)
    elif main:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    del weights
    kept = _optimizer_tensors(state)
    if state.replica.sharded:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            save(kept, storage_writer=HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True))
        except CheckpointException as error:  # a BaseException, raised in every process
            raise OSError(
                "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
            ) from error
    elif main:
        save_file({name: tensor.cpu().contiguous() for name, tensor in kept.items()}, folder / OPTIMIZER)
    random = {"data": state.generator.get_state()}
    random |= {f"cpu.{rank}": own for rank, own in enumerate(state.world.gather(torch.get_rng_state()))}
    if state.device.type == "cuda":
        states = state.world.gather(torch.cuda.get_rng_state(state.device))
        random |= {f"cuda.{rank}": own for rank, own in enumerate(states)}
    if main:
        save_file(random, folder / RANDOM)


def _describe(state: TrainState, progress: Progress, folder: Path) -> None:
    """Writes the other files; the last one, ``state.json``, lists all of them."""
    (folder / CONFIG).write_text(json.dumps(description(state.model.config), indent=2))
    state.task.save(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        "format": _FORMAT,
        "position": dataclasses.asdict(progress),
        "config": state.config.plain() | _fixed(state.config),
        "fingerprint": state.task.fingerprint,
        "data_digest": state.task.digest,
        "base_digest": state.base_digest,
        "processes": state.world.size,
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / STATE).write_text(json.dumps(described, indent=2))


def _prune(out: Path, progress: Progress, keep: int, keep_best: bool) -> None:
    """Keeps the last `keep` checkpoints and the best one; deletes the others, and those of later steps, of an earlier run."""
    done = [folder for folder in checkpoints(out) if _step(folder) <= progress.step]
    kept = {_step(folder) for folder in done[:keep]} | ({progress.best_step} if keep_best else set())
    for folder in checkpoints(out):
        if _step(folder) not in kept:
            remove_folder(folder)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Returns the optimizer's tensors for each trained parameter, by ``KEY.NAME``; not copies."""
    return {
        f"{key}.{name}": value.detach()
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(9)  # safetensors: the length of the header, then its opening brace
    if start[8:] != b"{" and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise WeightsError(f"{path}: is a pickle, which can run code when it is read; accepted is a safetensors file")


def _shapes(*paths: Path) -> dict[str, Tensor]:
    """Returns the tensors in safetensors files without their values, on the meta device."""
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    found[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: is damaged or no safetensors file ({error})") from error
    return found


def _load(tensors: dict[str, Tensor], source: Path) -> None:
    """Fills `tensors`, whole or sharded, from a safetensors file or from a folder of shards, of any number of processes."""
    from torch.distributed import is_initialized

    if source.is_dir():
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads alone
            try:
                load(tensors, storage_reader=HuggingFaceStorageReader(str(source)), no_dist=not is_initialized())
            except CheckpointException as error:  # a BaseException, raised in every process
                reason = next(iter(error.failures.values()))[0]
                raise WeightsError(f"{source}: is damaged or of another model ({reason})") from error
        return
    with torch.no_grad(), safe_open(source, framework="pt") as file:
        for name, tensor in tensors.items():
            tensor.copy_(shard_like(file.get_tensor(name), tensor))  # each process reads the whole and keeps its shard
