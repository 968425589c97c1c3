"""Chat templates in the formats that models document are rendered as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptcore.generate.chat import Chat
from gptcore.text.chat_template import Message, render
from gptcore.text.pretrained import PretrainedTokenizer
from gptcore.text.tokenizer import get_tokenizer
from tests.gptcore.small_tokenizers import byte_level, with_bos

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TURNS: list[Message] = [
    {"role": "user", "content": " 2 < 3 & 'so' on? "},
    {"role": "assistant", "content": 'Yes,\n"they" are — naïve \U0001f600'},
    {"role": "user", "content": "Why <b>?"},
]
SYSTEM: list[Message] = [{"role": "system", "content": "Be brief."}]

TEMPLATES = {
    "llama 2": """
{%- if messages[0].role == 'system' %}{% set about = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
{%- set rest = messages[1:] %}{% else %}{% set about = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if m.role == 'user' %}{{ bos_token + '[INST] ' + (about if loop.first else '') + m.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    "llama 3": """{{ bos_token }}
{%- set day = strftime_now('%d %b %Y') if strftime_now is defined else '1 Jan 2024' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + day + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none or documents is not none %}{{ raise_exception('no tools') }}{% endif %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
""",
    "mistral": """{{ bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}
{%- endfor %}""",
    "chatml": """{% for m in messages %}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' ~ role ~ '\n' ~ m['content'] | trim ~ '<end_of_turn>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "zephyr": """{% for m in messages %}
    {% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
    {% elif m['role'] == 'system' %}
{{ '<|system|>\n' + m['content'] + eos_token }}
    {% else %}
{{ '<|assistant|>\n' + m['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}""",
    "phi 3": """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "qwen": """{%- if tools %}{{- raise_exception('no tools') }}{% endif %}
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and '</think>' in m.content %}{% set text = m.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}{% set text = m.content %}{% endif %}
    {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined %}<think>{% endif %}{% endif %}""",
    "smollm": """{% for m in messages %}
{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\n/no_think<|im_end|>\n' }}{% endif %}
{% if m.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{% set text = m.content %}{{ text }}<|im_end|>{% endgeneration %}

{% else %}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{% endif %}
{% endfor %}{{ text is defined }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "command r": """{{ bos_token }}{% macro turn(role, text) %}<|START|><|{{ role | upper }}|>{{ text }}<|END|>{% endmacro %}
{% for m in messages %}{{ turn(m.role, m | tojson) }}{{ dict(a=m.content) | tojson(indent=2) }}{% endfor %}
{{ '<|START|><|CHATBOT|>' if add_generation_prompt }}""",
    "deepseek": """{% set ns = namespace(first=true, about='') %}
{%- for m in messages %}{% if m['role'] == 'system' %}{% set ns.about = m['content'] %}{% endif %}{% endfor %}
{{- bos_token }}{{ ns.about }}
{%- for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}
{%- if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}{% endif %}
{%- if m.role == 'assistant' %}{{ '<\uff5cAssistant\uff5c>' + m['content'] + '<\uff5cend\u2581of\u2581text\uff5c>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}""",
    "vicuna": """{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}
{%- if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}
{{- ('ASSISTANT:' if add_generation_prompt else '') + pad_token + unk_token }}{{ sep_token }}{{ cls_token is defined }}
""",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that puts BOS before a text, with some of the templates' special tokens."""
    made = with_bos(byte_level(*NAMES.values(), "<|im_start|>", "<|im_end|>"), "<s>")
    path = tmp_path_factory.mktemp("tokenizer")
    made.save(str(path / "tokenizer.json"))
    return path


def write(folder: Path, **about: object) -> None:
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind | NAMES | about))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_rendered_as_transformers_does(name: str, folder: Path):
    from transformers import AutoTokenizer

    write(folder, chat_template=TEMPLATES[name])
    ours, theirs = get_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for messages in (TURNS, [] if name in ("mistral", "gemma") else SYSTEM + TURNS, TURNS[:1]):
        for reply in (True, False) if messages else ():
            text = render(ours.chat_template, messages, special_tokens=ours.special_tokens_map, reply=reply)
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=False)
            assert ours.encode(text, allowed_special="all") == ids


def test_a_conversation_begins_with_one_bos(folder: Path):
    import torch

    from gptcore import GPT, GPTConfig

    write(folder, chat_template=TEMPLATES["llama 3"])
    tokenizer = get_tokenizer(folder)
    bos = tokenizer.encode("<s>", allowed_special="all")
    assert tokenizer.encode_prompt("a")[:1] == bos  # encode_prompt adds one too
    seen: list[list[int]] = []
    model = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, context=400, kernels="reference"))
    features = model._features
    model._features = lambda tokens, *rest: (seen.append(tokens[0].tolist()), features(tokens, *rest))[1]  # type: ignore[method-assign]
    torch.manual_seed(0)
    list(Chat(model, tokenizer, max_new_tokens=2, temperature=0.0).reply("hi"))
    assert seen[0][:1] == bos
    assert seen[0].count(bos[0]) == 1


def test_several_templates_by_name(folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    several = {"default": TEMPLATES["chatml"], "rag": "{{ bos_token }}by documents"}
    write(folder, chat_template=[{"name": name, "template": template} for name, template in several.items()])
    tokenizer = get_tokenizer(folder)
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert tokenizer.chat_template == several["default"]
    # transformers writes them as separate files; an export and a run's folder have them in one.
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "files")
    assert "chat_template" not in json.loads((tmp_path / "files" / "tokenizer_config.json").read_text())
    (tmp_path / "export").mkdir()
    tokenizer.save_huggingface(tmp_path / "export")
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in ("files", "export", "tokenizer.json"):
        again = get_tokenizer(tmp_path / place)
        assert isinstance(again, PretrainedTokenizer)
        assert again.chat_templates == several
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == several


def test_a_template_that_refuses_says_so_at_the_start(folder: Path):
    from gptcore import GPT, GPTConfig

    write(folder, chat_template=TEMPLATES["gemma"])
    tokenizer = get_tokenizer(folder)
    model = GPT(GPTConfig.preset("tiny", vocab_size=tokenizer.vocab_size, context=400))
    Chat(model, tokenizer)
    with pytest.raises(ValueError, match="chat_template: System role not supported"):
        Chat(model, tokenizer, system="Be brief.")
    write(folder, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(ValueError, match=r"has no chat template.*one of several must be named 'default'"):
        Chat(model, get_tokenizer(folder))
    for broken in ("{{ 1 + 'a' }}", "{{ messages[9].role }}", "{{ nothing.at.all }}", "{% if %}"):
        with pytest.raises(ValueError, match="chat_template: "):
            render(broken, TURNS)
