"""GPT with Llama's options equals Hugging Face's Llama; folders, shards and GGUF files; errors for what is not supported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptkernels.testing import assert_within_budget

from gptcore import GPT, GPTConfig
from gptcore.nn import Documents, RotaryScaling
from gptcore.text.tokenizer import get_tokenizer
from gptcore.weights import WeightsError, config_to_huggingface, from_huggingface, save_huggingface, to_huggingface

KERNELS = ["reference", *(["triton"] if torch.cuda.is_available() else ["native"])]
SMALL: dict[str, Any] = {"vocab_size": 61, "context": 32, "kernels": "reference"}


def make(seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig.preset("llama-tiny", **(SMALL | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def hugging_face(config: GPTConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**config_to_huggingface(config), attn_implementation="eager"))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 16}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_impl": "explicit"}, {"tied": False, "rotary_base": 500.0}, {"rotary_scaling": SCALED}],
    ids=["grouped", "explicit", "untied", "scaled rotary"],
)
def test_logits_and_gradients_equal_hugging_faces(changes: dict, kernels: str, device: str, tmp_path: Path):
    config = GPTConfig.preset("llama-tiny", **(SMALL | {"kernels": kernels} | changes))
    plain = hugging_face(config).to(device)
    plain.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, kernels=kernels, attention_impl=config.attention_impl).to(device)
    assert ours.config == config  # transformers' config.json holds the whole configuration
    exact = hugging_face(config).to(device).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in plain.state_dict().items()})
    results: list[dict[str, list[torch.Tensor]]] = [{}, {}, {}]
    for draw in range(4):
        x, y = tokens(2, 29, seed=2 * draw + 1).to(device), tokens(2, 29, seed=2 * draw + 2).to(device)
        for model, found in zip((plain, exact, ours), results):
            logits = model(x) if model is ours else model(x).logits
            loss = (
                ours.loss(x, y)
                if model is ours
                else torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
            )
            names, parameters = zip(*model.named_parameters())
            gradients = dict(zip(names, torch.autograd.grad(loss, parameters)))
            values = gradients if model is ours else from_huggingface(gradients, tied=config.tied)
            for name, value in {"logits": logits, **values}.items():
                found.setdefault(name, []).append(value.detach())
    assert set(results[2]) == set(results[0])
    for name, values in results[2].items():
        assert_within_budget(name, *(torch.stack(v) for v in (values, results[0][name], results[1][name])))


@pytest.mark.parametrize("preset", ["llama-tiny", "tiny"])
def test_converting_to_hugging_face_and_back_changes_nothing(preset: str, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, **SMALL, tied=False))
    state = model.state_dict()
    back = from_huggingface(to_huggingface(state, model.config), tied=False)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    save_huggingface(tmp_path, model.config, state)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    x = tokens(2, 19)
    torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-5)


def test_configurations_that_no_hugging_face_model_has_are_refused(tmp_path: Path):
    for changes, match in (
        ({"norm": "layer_norm"}, "norm: got 'layer_norm' with rotary positions; Hugging Face's llama has 'rms_norm'"),
        ({"positions": "learned"}, "norm: got 'rms_norm' with learned positions; Hugging Face's gpt2 has 'layer_norm'"),
    ):
        model = make(**changes)
        with pytest.raises(WeightsError, match=match):
            save_huggingface(tmp_path / "out", model.config, model.state_dict())
    assert not (tmp_path / "out").exists()


def test_weights_in_shards(tmp_path: Path):
    plain = hugging_face(make().config)
    plain.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    x = tokens(1, 9)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(x), plain(x).logits, rtol=1e-4, atol=1e-5)
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(WeightsError, match=f"{missing.name}: there is no such file"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("model_type: got 'bloom'; accepted are 'gpt2', 'llama', 'mistral'", {"model_type": "bloom"}),
        ("hidden_act: got 'gelu'; accepted is 'silu'", {"hidden_act": "gelu"}),
        ("attention_bias: got True", {"attention_bias": True}),
        ("head_dim: got 32; accepted is hidden_size / num_attention_heads, 16", {"head_dim": 32}),
        ("rope_type: got 'yarn'; accepted are 'default' and 'llama3'", {"rope_scaling": {"rope_type": "yarn"}}),
        ("sliding_window: got 8", {"model_type": "mistral", "sliding_window": 8}),
    ],
)
def test_unsupported_options_of_other_configurations_are_refused(match: str, change: dict, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_huggingface(make().config) | change))
    with pytest.raises(WeightsError, match=match):
        GPT.from_pretrained(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path):
    make().save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    GPT.from_pretrained(tmp_path)  # the safetensors file beside it is read
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: is a pickle.*accepted is model\.safetensors"):
        GPT.from_pretrained(tmp_path)


def test_a_failed_download_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*arguments: object, **options: object) -> str:
        raise ConnectionError("Name or service not known\nPlease check your connection.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    message = (
        "runs/nowhere: there is no such folder, and the hub's model could not be downloaded: Name or service not known"
    )
    with pytest.raises(WeightsError, match=f"^{message}$"):
        GPT.from_pretrained("runs/nowhere")


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"n_kv_head: got 3; accepted are divisors of n_head, 4", {"n_kv_head": 3}),
        (r"mlp_width: got 0; accepted are positive integers", {"mlp_width": 0}),
        (r"norm: got 'batch'; accepted are 'layer_norm', 'rms_norm'", {"norm": "batch"}),
        (r"rotary_base: got 0", {"rotary_base": 0.0}),
        (r"n_head: got 64, heads of 1; accepted for rotary are even heads", {"n_head": 64, "n_kv_head": 1}),
        (r"rotary_scaling: got it with positions 'learned'", {"positions": "learned", "rotary_scaling": SCALED}),
    ],
)
def test_bad_configurations(match: str, change: dict):
    with pytest.raises(ValueError, match=match):
        GPTConfig.preset("llama-tiny", **change)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("preset", ["llama-tiny", "tiny"])
def test_padding_changes_nothing(preset: str, kernels: str, device: str):
    """A short row beside a long one, with a cache, gives the same logits as alone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, **(SMALL | {"kernels": kernels}))).to(device)
    long, short = tokens(1, 12).to(device), tokens(1, 7, seed=2).to(device)
    both = torch.cat([long, torch.cat([torch.full_like(long[:, :5], 9), short], dim=1)])
    cache = model.new_cache(20, torch.tensor([0, 5], device=device))
    parts = [model(piece, cache) for piece in both.split([8, 1, 3], dim=1)]
    logits = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[:1], model(long), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1:, 5:], model(short), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("padding", [None, [0, 3]])
def test_a_step_at_a_position_in_device_memory(padding, kernels: str, device: str):
    """The step that a CUDA graph captures: one token, its position a tensor, attention over the cache's whole capacity."""
    model, x = make(kernels=kernels).to(device), tokens(2, 15).to(device)
    pad = None if padding is None else torch.tensor(padding, device=device)
    plain, graphed = model.new_cache(32, pad), model.new_cache(32, pad)
    model(x[:, :9], plain), model(x[:, :9], graphed)
    graphed.at = torch.tensor([9], device=device)
    for t in range(9, 15):
        graphed.at.fill_(t)
        expected = model(x[:, t : t + 1], plain)
        torch.testing.assert_close(model(x[:, t : t + 1], graphed), expected, rtol=1e-4, atol=1e-5)
        graphed.length += 1


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["llama-tiny", "tiny"])
def test_cuda_graphs_change_no_token(preset: str):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, **(SMALL | {"kernels": "triton"}))).cuda()
    x = tokens(2, 5).cuda()
    graphed = model.generate(x, 40, temperature=0.0)
    assert torch.equal(graphed, model.generate(x, 40, temperature=0.0, use_cache=False))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("preset", ["llama-tiny", "tiny"])
def test_packed_documents_have_the_loss_of_separate_ones(preset: str, kernels: str, device: str):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset, **(SMALL | {"kernels": kernels}))).to(device)
    x, y = tokens(2, 24), tokens(2, 24, seed=2)
    x[x == 60] = 0
    x[0, 6] = x[0, 7] = x[1, 23] = 60  # 60 ends a document: rows of 7, 1, 16 and of 24 tokens
    documents = Documents.of(x, 60)
    assert documents.cu_lengths.tolist() == [0, 7, 8, 24, 48]
    assert documents.max_length == 24
    x, y, documents = x.to(device), y.to(device), documents.to(torch.device(device))
    packed = model.loss(x, y, documents)
    gradient = torch.autograd.grad(packed, model.wte.weight)[0]
    pieces = [(0, 0, 7), (0, 7, 8), (0, 8, 24), (1, 0, 24)]
    alone = sum(model.loss(x[r : r + 1, a:b], y[r : r + 1, a:b]) * (b - a) for r, a, b in pieces) / 48
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(alone, model.wte.weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert float((model.loss(x, y) - packed).abs()) > 1e-4  # without them attention crosses documents
    with pytest.raises(ValueError, match="documents: got them without targets"):
        model(x, documents=documents)
    with pytest.raises(ValueError, match="documents: got them with explicit attention"):
        GPT(dataclasses.replace(model.config, attention_impl="explicit")).loss(x.cpu(), y.cpu(), documents)


# GGUF ---------------------------------------------------------------------------------------------------------------

TEXT = "the cat sat on the mat, the cat sat in 1999 and 2024. " * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def byte_bpe() -> Any:
    """A small byte-level BPE of the tokenizers library, special tokens first, each digit a token (as SmolLM2's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


@pytest.fixture(scope="module")
def gguf_file(byte_bpe, tmp_path_factory) -> tuple[Path, Any]:
    """A Hugging Face Llama with random weights, written by the gguf library as llama.cpp's converter lays it out."""
    gguf = pytest.importorskip("gguf")
    scaling = RotaryScaling(8.0, 1.0, 4.0, 8192)
    changes = {"vocab_size": byte_bpe.get_vocab_size(), "rotary_scaling": scaling}
    theirs = hugging_face(GPTConfig.preset("llama-tiny", **(SMALL | changes)))
    config, state = theirs.config, theirs.state_dict()
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    vocabulary = sorted(byte_bpe.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(byte_bpe.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    divisors = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / theirs.model.rotary_emb.inv_freq
    writer.add_tensor("rope_freqs.weight", divisors.numpy())
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate"}
    parts |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}
    parts |= {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        if (new := outside.get(name)) is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            new = f"blk.{layer}.{parts[part]}.weight"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(parts[part])
            if heads:  # GGUF stores the two values of a rotated pair side by side
                tensor = torch.stack(tensor.view(heads, 2, -1, tensor.shape[1]).unbind(1), 2).view_as(tensor)
        data = tensor.numpy().astype(np.float32)
        if "ffn" in new and "norm" not in new:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(new, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, theirs


def test_a_gguf_file_gives_the_model_it_was_made_from(gguf_file):
    path, theirs = gguf_file
    ours = GPT.from_pretrained(path, kernels="reference")
    assert ours.config.rotary_scaling == RotaryScaling(pytest.approx(8.0), 1.0, 4.0, 8192)
    for layer, block in zip(theirs.model.layers, ours.h):
        for projection in (
            layer.mlp.gate_proj,
            layer.mlp.up_proj,
            layer.mlp.down_proj,
        ):  # Q8_0: 8 bits and a scale for 32
            rows = projection.weight.data.view(-1, 32)
            step = rows.abs().amax(1, keepdim=True) / 127
            assert float(((rows / step).round() * step - rows).abs().max()) > 0  # quantising does change the weights
        packed = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        torch.testing.assert_close(block.mlp.c_fc.weight, packed, rtol=0, atol=float(packed.abs().max()) / 200)
        layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data = block.mlp.c_fc.weight.data.chunk(2)
        layer.mlp.down_proj.weight.data = block.mlp.c_proj.weight.data
    x = tokens(2, 21)
    torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-4, atol=1e-5)


def test_a_gguf_file_gives_the_tokenizer_it_was_made_from(gguf_file, byte_bpe, tmp_path: Path):
    tokenizer = get_tokenizer(gguf_file[0])
    texts = ["the cat sat", "in  1999, and\n\n 2024 ", "naïve 日本 \U0001f600", " <|im_end|> is text"]
    byte_bpe.encode_special_tokens = True
    for text in texts:
        assert tokenizer.encode(text) == byte_bpe.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode("a<|im_end|>", allowed_special="all")[-1] == 2
    assert tokenizer.stop_tokens == (0, 2)
    assert tokenizer.eot_token == 0
    assert tokenizer.chat_template == TEMPLATE
    tokenizer.save(tmp_path / "tokenizer.json")
    again = get_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == TEMPLATE
    assert again.stop_tokens == (0, 2)
    assert again.encode(texts[2]) == tokenizer.encode(texts[2])
    damaged = json.loads((tmp_path / "tokenizer.json").read_text())
    damaged["tokenizer"]["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="damaged tokenizer file: its contents have the fingerprint"):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_a_gguf_files_rotary_frequencies_are_llama_3s(factor: float):
    """A GGUF file has the divisors of the frequencies; the scaling in transformers' configuration gives the same ones."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from gptcore.weights.gguf import llama3_scaling

    config = GPTConfig.preset("llama-tiny", n_head=2, n_kv_head=1, width=128, rotary_base=500000.0)
    scaling = RotaryScaling(factor, 1.0, 4.0, 8192)
    theirs = LlamaConfig(**config_to_huggingface(dataclasses.replace(config, rotary_scaling=scaling)))
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")[0]
    divisors = config.rotary_base ** -(torch.arange(0, 64, 2) / 64) / frequencies
    assert len(divisors.unique()) > 3
    found = llama3_scaling(divisors, 64, config.rotary_base, 8192)
    assert found == dataclasses.replace(scaling, factor=pytest.approx(factor))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight: got other frequencies than Llama 3's"):
        llama3_scaling(divisors.sqrt(), 64, config.rotary_base, 8192)


def test_damaged_gguf_files(gguf_file, tmp_path: Path):
    whole = gguf_file[0].read_bytes()
    for n in (3, 2000, len(whole) // 2):
        path = tmp_path / f"{n}.gguf"
        path.write_bytes(whole[:n])
        with pytest.raises(WeightsError, match=rf"{n}\.gguf: is damaged or no GGUF file"):
            GPT.from_pretrained(path)
    path = tmp_path / "other.gguf"
    path.write_bytes(whole.replace(b"llama", b"bloom"))
    with pytest.raises(WeightsError, match=r"general\.architecture: got 'bloom'; accepted is 'llama'"):
        GPT.from_pretrained(path)
