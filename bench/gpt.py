"""Times whole models on this CPU: ``python -m bench.gpt`` trains GPT-2 124M and generates text.

Training is `bench.speedup`'s comparison of ``--kernels reference`` and ``auto``, on real text. Generation is compared with
Hugging Face's generate: one sequence, greedy, with a key/value cache and the same weights. Ours runs in bf16; Hugging Face's
in fp32, and in bf16 too where the CPU multiplies that. They take turns in one process, and medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gptkernels
import torch
from torch import Tensor

from bench import speedup
from bench.cpu import machine
from bench.measure import add_saving_options, save
from gptcore import GPT, GPTConfig
from gptcore.train.hardware import model_flops_utilization, multiplies_bf16


def _models(name: str) -> tuple[Any, Any]:
    """Our model in bf16, and transformers' model in float32 with the same weights."""
    import transformers

    from gptcore.weights import config_to_huggingface, to_huggingface

    if name == "gpt2-124m":
        torch.manual_seed(0)
        ours = GPT(GPTConfig.preset(name))
        theirs: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config_to_huggingface(ours.config)))
    else:
        ours = GPT.from_pretrained(name)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config_to_huggingface(ours.config)))
    theirs.load_state_dict(to_huggingface(ours.state_dict(), ours.config), strict=False)
    theirs.tie_weights()
    return ours.to(torch.bfloat16).eval(), theirs.eval()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(name: str, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Seconds that each contender takes to generate `new` tokens after a prompt of `prompt` tokens, for each round."""
    ours, theirs = _models(name)
    tokens = torch.randint(0, ours.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(tokens)

    def hugging_face(model: Any) -> Callable[[], Tensor]:
        return lambda: model.generate(tokens, **options)

    contenders: dict[str, Callable[[], object]] = {"fp32": hugging_face(theirs)}
    if multiplies_bf16(torch.device("cpu")):  # without these instructions PyTorch takes minutes
        contenders["bf16"] = hugging_face(copy.deepcopy(theirs).to(torch.bfloat16))
    contenders["ours"] = lambda: ours.generate(tokens, new, temperature=0.0)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for work in contenders.values():
        work()
    for _ in range(rounds):
        for contender, work in contenders.items():
            seconds[contender].append(_seconds(work))
    return {"model": name, "prompt": prompt, "new": new, "seconds": seconds}


def decoding_table(decoding: dict[str, Any]) -> list[str]:
    """Markdown lines: tokens a second of Hugging Face's fastest and of ours."""
    rows = ["| generation, one sequence | Hugging Face generate, tokens/s | ours in bf16 | ratio |"]
    rows.append("| --- | --- | --- | --- |")
    for result in decoding["models"]:
        speeds = {name: result["new"] / statistics.median(seconds) for name, seconds in result["seconds"].items()}
        ours = speeds.pop("ours")
        best = max(speeds, key=speeds.__getitem__)
        name = f"{result['model']}, {result['prompt']} + {result['new']} tokens"
        rows.append(f"| {name} | {speeds[best]:.1f} ({best}) | {ours:.1f} | {ours / speeds[best]:.2f}x |")
    return rows


def training_table(training: dict[str, Any]) -> list[str]:
    """Markdown lines: a row for each choice of kernels."""
    steps, preset, about = training["steps"], training["preset"], training["about"]
    # One peak for both rows: the two processes measured slightly different ones.
    peak = 1e9 * training["machine"]["product_gflop_per_s"][training["dtype"]]
    rows = [f"| training {preset}, {steps} steps of {about} | tokens/s | MFU | peak memory | validation loss |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for kernels, row in training["rows"].items():
        speed, memory = row["tokens_per_second"], f"{row['peak'] / 2**20:,.0f} MiB"
        mfu = model_flops_utilization(speed * training["flops_per_token"], peak)
        rows.append(f"| `--kernels {kernels}` | {speed:,.0f} | {mfu:.0%} | {memory} | {row['val_loss']:.4f} |")
    return rows


def section(saved: dict[str, Any]) -> str:
    """What docs/benchmarks.md shows of a saved result: each table, and on what it was measured."""
    parts = []
    for name, table in (("training", training_table), ("decoding", decoding_table)):
        if name in saved:
            m = saved[name]["machine"]
            made = f"{m['cpu']}, {m['instructions']}, {m['threads']} threads, PyTorch {m['torch']}"
            parts += [f"{made}, commit {m['commit']}, {m['date']}:", "\n".join(table(saved[name]))]
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpt",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  gptcore fetch smollm2-135m-instruct && python -m bench.gpt\n"
        "  gptcore fetch shakespeare && gptcore prepare shakespeare --tokenizer gpt2 --out data/shakespeare && "
        "python -m bench.gpt --data data/shakespeare --out bench/results\n"
        "  python -m bench.gpt --models gpt2-124m --new 32",
    )
    default = ["gpt2-124m", "smollm2-135m-instruct"]
    parser.add_argument("--models", nargs="*", default=default, help=f"to generate with (default: {' '.join(default)})")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default: 32)")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--data", type=Path, help="folder made by gptcore prepare, to train on (default: no training)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of each training run (default: 50)")
    parser.add_argument("--preset", default="gpt2-124m", help="size of the model to train (default: gpt2-124m)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a training sequence (default: 512)")
    add_saving_options(parser, "gpt-<cpu>.json")
    options = parser.parse_args(arguments)
    about = machine(options.commit)
    saved: dict[str, Any] = {"kind": "gpt"}
    file = (options.out or Path()) / f"{'-'.join(['gpt', *about['cpu'].lower().split(), about['instructions']])}.json"
    if options.out and file.exists():  # what is not measured now stays, with its own date
        saved = json.loads(file.read_text())
    if options.data:
        size = {"preset": options.preset, "context": options.context, "batch_size": 1}
        rows = speedup.compare(options.data, steps=options.steps, **size)
        what = f"one sequence of {options.context} tokens, {options.data.name}"
        with torch.device("meta"):
            flops = GPT(GPTConfig.preset(options.preset)).flops((1, options.context)) / options.context
        dtype = "bf16" if multiplies_bf16(torch.device("cpu")) else "fp32"  # what gptcore train takes here
        saved["training"] = {
            "machine": about, "steps": options.steps, "preset": options.preset, "about": what, "rows": rows,
            "dtype": dtype, "flops_per_token": flops,
        }  # fmt: skip
    if options.models:
        gptkernels.tune_allocator()
        models = [measure(name, options.prompt, options.new, options.rounds) for name in options.models]
        saved["decoding"] = {"machine": about, "models": models}
    print(section(saved))
    if options.out:
        save(saved, file)
        print(f"\nsaved as {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
