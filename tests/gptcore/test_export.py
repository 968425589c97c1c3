"""Exported models and tokenizers: transformers loads them and generates the same tokens; we load them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcore import GPT, GPTConfig
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import Tokenizer, get_tokenizer
from tests.gptcore.runs import main
from tests.gptcore.small_tokenizers import byte_level, with_bos

TEXT = "the cat sat on the mat and the dog sat on the log, naïve \U0001f600 1999. " * 30


def export(model: Path, out: Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--model", str(model), "--out", str(out)])
    return int(stop.value.code or 0)


def make(tokenizer: Any, prompt: str, folder: Path, preset: str) -> tuple[GPT, list[int]]:
    """A random model saved with its tokenizer, and the prompt with its greedy continuation, which ends with a stop token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, vocab_size=tokenizer.vocab_size, kernels="reference")).eval()
    ids = torch.tensor([tokenizer.encode_prompt(prompt)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
        free = model.generate(ids, 20, temperature=0.0)[0, ids.shape[1] :].tolist()
        last = next(i for i in free[2:] if i not in (*ids[0].tolist(), *free[:2]))
        rows = [last, tokenizer.stop_tokens[-1]]
        model.wte.weight[rows] = model.wte.weight[rows[::-1]]  # the stop token comes where that token came
    expected = model.generate(ids, 20, temperature=0.0, stop=tokenizer.stop_tokens)[0].tolist()
    assert 2 < len(expected) - ids.shape[1] < 20
    assert expected[-1] == tokenizer.stop_tokens[-1]
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return model, expected


def files(folder: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], vocab_size=280)


@pytest.mark.parametrize("preset", ["tiny", "llama-tiny"])
def test_transformers_loads_an_exported_folder(preset: str, tokenizer: Tokenizer, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, expected = make(tokenizer, "the cat", tmp_path / "run", preset)
    assert export(tmp_path / "run", tmp_path / "hf") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the cat sat", "naïve \U0001f600  1999\n\n x", "unseen WORDS?!"):
        ids = their_tokenizer(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, model(torch.tensor([ids])), rtol=1e-4, atol=1e-5)
    assert their_tokenizer.eos_token_id == tokenizer.eot_token
    again = get_tokenizer(tmp_path / "hf")
    assert again.encode("the dog") == tokenizer.encode("the dog")
    assert again.eot_token == tokenizer.eot_token
    prompt = their_tokenizer("the cat", return_tensors="pt")
    assert theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist() == expected
    assert export(tmp_path / "hf", tmp_path / "again") == 0
    assert files(tmp_path / "again") == files(tmp_path / "hf")
    for _ in range(2):  # a folder that holds files is not overwritten
        assert export(tmp_path / "run", tmp_path / "hf") == 2


def test_an_export_keeps_special_tokens_and_generation_settings(tmp_path: Path):
    """Those of a folder that transformers wrote, also after transformers has loaded and saved the export."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    made = with_bos(byte_level(*names.values(), "<|end|>"), "<s>")
    bos, eos, pad, end = (made.token_to_id(token) for token in ("<s>", "</s>", "<pad>", "<|end|>"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    made.save(str(theirs / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "padding_side": "left"}
    about |= {
        "extra_special_tokens": ["<|end|>"],
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "bos_token": {"content": "<s>"},
    }
    (theirs / "tokenizer_config.json").write_text(json.dumps(names | about))
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [eos, end], "bos_token_id": bos}
    (theirs / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = get_tokenizer(theirs)
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert tokenizer.stop_tokens == (eos, end)  # from generation_config.json, besides the tokenizer's
    (theirs / "generation_config.json").rename(theirs / "not.json")
    (theirs / "config.json").write_text(
        json.dumps({"eos_token_id": 50256})
    )  # a default, which is no id of this tokenizer
    assert get_tokenizer(theirs).stop_tokens == (eos,)
    (theirs / "not.json").rename(theirs / "generation_config.json")
    model, expected = make(tokenizer, "the cat", tmp_path / "run", "llama-tiny")
    assert export(tmp_path / "run", tmp_path / "1") == 0  # from a run with this tokenizer
    model.save_pretrained(tmp_path / "weights")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / "weights" / name).write_bytes((theirs / name).read_bytes())
    assert export(tmp_path / "weights", tmp_path / "2") == 0
    assert files(tmp_path / "2")["generation_config.json"] == generation | {"pad_token_id": pad}
    for folder in (tmp_path / "1", tmp_path / "2"):
        loaded, its_tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert its_tokenizer.special_tokens_map == names
        assert (its_tokenizer.chat_template, its_tokenizer.padding_side) == (about["chat_template"], "left")
        assert (its_tokenizer.model_max_length, its_tokenizer.extra_special_tokens) == (64, ["<|end|>"])
        assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == [eos, end]
        assert (loaded.config.bos_token_id, loaded.generation_config.pad_token_id) == (bos, pad)
        prompt = its_tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
        assert loaded.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist() == expected
        saved = folder.with_name(f"{folder.name} saved")
        loaded.save_pretrained(saved), its_tokenizer.save_pretrained(saved)
        assert export(saved, folder.with_name(f"{folder.name} again")) == 0
        first, again = files(folder), files(folder.with_name(f"{folder.name} again"))
        assert again["config.json"] == first["config.json"]
        assert again["tokenizer_config.json"] == first["tokenizer_config.json"]
        assert again["generation_config.json"].items() >= first["generation_config.json"].items()
        assert get_tokenizer(saved).encode_prompt("the <s> cat") == tokenizer.encode_prompt("the <s> cat")
