"""EleutherAI's lm-evaluation-harness on our models, with a task in local files: nothing is downloaded."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.generate import Request, encode_pair, generate_text, log_likelihoods
from gptcore.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", autouse=True)
def _harness() -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")


LINES = [
    {"question": "two plus two is", "choices": ["four", "five and six", "2"], "gold": 0},
    {"question": "the cat sat on the", "choices": ["mat", "dog and the log", "cat"], "gold": 0},
    {"question": "a dog is no", "choices": ["cat", "dog", "log on the mat"], "gold": 2},
]
CHOICE = """
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with its tokenizer as a run has them, and the task's files."""
    pytest.importorskip("rustbpe")
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = Tokenizer.train(
        ["Question: two plus two is four, the cat sat on the mat and the dog. Answer: " * 30], 300
    )
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, context=48, kernels="reference"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder / "model")
    tokenizer.save(folder / "model/tokenizer.json")
    (folder / "tasks").mkdir()
    (folder / "tasks/lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "tasks/small_choice.yaml").write_text(CHOICE.format(file=folder / "tasks/lines.jsonl"))
    return folder


def loaded(saved: Path):
    """The harness's model."""
    from gptcore.evaluate.harness import HarnessModel

    return HarnessModel(pretrained=str(saved / "model"), kernels="reference")


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The library of data sets reads files only, and keeps its copies in `cache`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "cache")


def asked(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_a_task_of_the_harness_gives_our_own_scores(saved: Path, monkeypatch, tmp_path: Path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    import gptcore.evaluate.harness  # noqa: F401 - adds the model type

    offline(monkeypatch, tmp_path)
    found = lm_eval.simple_evaluate(
        model="gptcore",
        model_args={"pretrained": str(saved / "model"), "kernels": "reference"},
        tasks=["small_choice"],
        task_manager=TaskManager(include_path=str(saved / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    model, tokenizer = GPT.from_pretrained(saved / "model", kernels="reference"), Tokenizer.load(saved / "model")
    right = 0
    for sample, line in zip(found["samples"]["small_choice"], LINES):
        pairs = [encode_pair(tokenizer, f"Question: {line['question']}\nAnswer:", f" {c}") for c in line["choices"]]
        scores = log_likelihoods(model, [Request(pairs[0][0], [candidate for _, candidate in pairs])])[0]
        values = [score.log_likelihood for score in scores]
        assert [float(r[0]) for r in sample["filtered_resps"]] == pytest.approx(values, abs=1e-4)
        right += values.index(max(values)) == line["gold"]
    assert found["results"]["small_choice"]["acc,none"] == pytest.approx(right / len(LINES))


def test_likelihoods_and_texts_equal_those_of_the_harness_on_transformers(saved: Path, monkeypatch, tmp_path: Path):
    """The model is exported, and the harness's own model type `hf` reads the export."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.gptcore.runs import main

    with pytest.raises(SystemExit, match="0"):
        main(["export", "--model", str(saved / "model"), "--out", str(tmp_path / "hf")])
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = HFLM(pretrained=peer, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "hf"), batch_size=4, device="cpu")
    ours = loaded(saved)
    pairs = [asked(f"Question: {line['question']}\nAnswer:", f" {c}") for line in LINES for c in line["choices"]]
    pairs += [asked("", "the cat"), asked("the cat ", "sat"), asked("the cat and the dog " * 9, "sat on the mat")]
    for (value, greedy), (other, same) in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs)):
        assert (value, greedy) == (pytest.approx(other, abs=1e-3), same)
    texts = [
        asked("the cat sat"),
        asked("the dog and the cat sat on the mat. " * 8),
    ]  # the second takes several windows
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-2)
    greedy = {"until": ["t"], "max_gen_toks": 12}
    prompts = [asked("the cat", greedy), asked("the dog sat on", greedy), asked("the dog " * 40, greedy)]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_contexts_that_are_too_long_lose_their_beginning_with_a_warning(saved: Path, caplog):
    model = loaded(saved)
    with caplog.at_level(logging.WARNING, "gptcore"):
        model.loglikelihood([asked("the cat " * 60, "sat"), asked("the", " cat")], disable_tqdm=True)
    assert "1 of 2 contexts were too long and lost their first tokens" in caplog.text
    with pytest.raises(ValueError, match=r"continuation: got \d+ tokens; accepted are up to the context, 48"):
        model.loglikelihood([asked("the", " cat 7" * 60)], disable_tqdm=True)


def test_options_of_generation(saved: Path):
    model = loaded(saved)
    sampled = {"until": ["\n"], "max_new_tokens": 5, "do_sample": True, "temperature": 0.9, "seed": 3}
    texts = model.generate_until(
        [asked("the cat", sampled), asked("the dog", {"until": "\n", "max_gen_toks": 4})], True
    )
    expected = generate_text(model.model, model.tokenizer, ["the cat"], 5, stop=["\n"], temperature=0.9, seed=3)
    assert texts == [
        expected[0],
        generate_text(model.model, model.tokenizer, ["the dog"], 4, stop=["\n"], temperature=0)[0],
    ]
    with pytest.raises(ValueError, match="num_beams: is no option of generation here"):
        model.generate_until([asked("the cat", {"num_beams": 3, "max_gen_toks": 4})], True)
    with pytest.raises(ValueError, match="max_gen_toks: got 48; accepted are 1 to 47"):
        model.generate_until([asked("the cat", {"max_gen_toks": 48})], True)


def test_bad_arguments_are_refused(saved: Path):
    from gptcore.evaluate.harness import HarnessModel

    with pytest.raises(ValueError, match="pretrained: got none"):
        HarnessModel()
    with pytest.raises(ValueError, match="dtype: got 'int8'; accepted are auto, float32 and bfloat16"):
        HarnessModel(pretrained=str(saved / "model"), dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has no chat template"):
        loaded(saved).apply_chat_template([{"role": "user", "content": "hello"}])


def test_the_harness_s_command_line_knows_our_model_type(saved: Path, tmp_path: Path, monkeypatch, capsys):
    from lm_eval import tasks

    from gptcore.evaluate import harness

    # The harness's own tasks, thousands of files, are left out.
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    offline(monkeypatch, tmp_path)
    options = ["--model", "gptcore", "--model_args", f"pretrained={saved / 'model'},kernels=reference"]
    options += ["--tasks", "small_choice", "--include_path", str(saved / "tasks")]
    options += ["--output_path", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["harness", *options])
    harness.main()
    assert "small_choice" in capsys.readouterr().out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["model"] == "gptcore"
