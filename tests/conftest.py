"""Shared fixtures: one tiny random model per family, saved as transformers saves it, with a byte-level tokenizer.

tiny_config("gemma3")            -> transformers configuration, also of OTHERS
tiny_model("gemma3")             -> transformers model, seeded, weights large enough that every term matters
tiny_folder("gemma3", **changes) -> folder with config.json, model.safetensors, tokenizer.json
save_tiny(folder, "gemma3", **changes): the same at a place of the test's own, for fixtures of wider scope
quick_shelf("name"), run("export m ..."): a working folder for whole commands on tiny models, and the command line
tiny_encoder("mpnet"), save_encoder(folder, "mpnet"): the same for sentence encoders, with sentence-transformers' files
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core
os.environ["JPQ_KERNELS"] = "off"  # compiling them takes half a minute a cache; tests/plugins turns them on

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# name -> model type, what differs from COMMON
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 6}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 321,  # as GPT-2's own, not a multiple of anything
            "n_inner": 96,
            "intermediate_size": None,
            "num_key_value_heads": None,
            "tie_word_embeddings": True,
        },
    ),
}
# Families that only torch.onnx.export takes: sub-layers side by side and a quarter of each head rotated, a table of
# positions behind an offset and a tied head, grouped queries with biases and layer norms.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_hidden_layers": 1, "tie_word_embeddings": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "num_hidden_layers": 1}),  # tracing takes 5 s, and 2 s a layer
}

ENCODER = COMMON | {"num_key_value_heads": None, "max_position_embeddings": 130, "pad_token_id": 1}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"pad_token_id": 0}),
    "bge": ("bert", {"pad_token_id": 0, "hidden_act": "gelu_new"}),
    "roberta": ("roberta", {}),
    "xlm_roberta": ("xlm-roberta", {"layer_norm_eps": 1e-5}),
    "mpnet": ("mpnet", {}),
}

SENTENCE_MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}


def byte_characters() -> list[str]:
    """The printable stand-ins of the 256 byte values, as byte-level tokenizers write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    character = {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}
    return [character[value] for value in range(256)]


def tiny_tokenizer_json(*, add_bos: bool = False) -> dict[str, Any]:
    """Bytes, three special tokens, two merges: 261 tokens, nothing trained."""
    vocab = {character: i for i, character in enumerate(byte_characters())} | {"th": 259, "the": 260}
    special = ["<s>", "</s>", "<pad>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
    }
    return {
        "version": "1.0",
        "added_tokens": [{"id": 256 + i, "content": token} | flags for i, token in enumerate(special)],
        "pre_tokenizer": byte_level,
        "post_processor": template if add_bos else None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["t", "h"], ["th", "e"]]},
    }


def is_norm_weight(name: str) -> bool:
    """Whether a tensor multiplies what a norm gives; GPT-2 calls its norms ln_1, ln_2 and ln_f."""
    return name.endswith(".weight") and ("norm" in name or ".ln_" in name)


@pytest.fixture(scope="session")
def tiny_names() -> list[str]:
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    def make(name: str, **changes: Any) -> Any:
        from transformers import CONFIG_MAPPING

        model_type, facts = (TINY | OTHERS)[name]
        # A copy: configuration classes write into the dictionaries they are given.
        facts = json.loads(json.dumps(COMMON | facts | changes))
        return CONFIG_MAPPING[model_type](**{key: value for key, value in facts.items() if value is not None})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    def make(name: str, *, seed: int = 0, **changes: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        config = tiny_config(name, **changes)
        config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in sorted(model.named_parameters()):
            # Wide enough that attention is not uniform and no norm, bias or window is lost in rounding.
            parameter.normal_(0, 0.2, generator=generator)
            if is_norm_weight(parameter_name) and not name.startswith("gemma"):
                parameter.add_(1)
        return model

    return make


@pytest.fixture(scope="session")
def save_tiny(tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    def save(folder: Path, name: str, *, add_bos: bool = False, seed: int = 0, **changes: Any) -> Path:
        tiny_model(name, seed=seed, **changes).save_pretrained(folder)
        body = json.dumps(tiny_tokenizer_json(add_bos=add_bos), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(body, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_encoder() -> Callable[..., Any]:
    def make(name: str, *, seed: int = 0, **changes: Any) -> Any:
        import torch
        from transformers import CONFIG_MAPPING, AutoModel

        model_type, facts = ENCODERS[name]
        config = CONFIG_MAPPING[model_type](**(ENCODER | facts | changes))
        config._attn_implementation = "eager"
        model = AutoModel.from_config(config).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter_name, parameter in sorted(model.named_parameters()):
            parameter.normal_(0, 0.2, generator=generator)
            if "LayerNorm.weight" in parameter_name:
                parameter.add_(1)
        return model

    return make


@pytest.fixture(scope="session")
def save_encoder(tiny_encoder: Callable[..., Any]) -> Callable[..., Path]:
    def save(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
        tiny_encoder(name, seed=seed, **changes).save_pretrained(folder)
        body = json.dumps(tiny_tokenizer_json(add_bos=True), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(body, encoding="utf-8")
        if name == "bge":
            modules = [{"type": f"st.{kind}", "path": path} for kind, path in SENTENCE_MODULES.items()]
            (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
            (folder / "1_Pooling").mkdir(exist_ok=True)
            pooling = '{"word_embedding_dimension": 64, "pooling_mode_cls_token": true, "pooling_mode_x": false}'
            (folder / "1_Pooling" / "config.json").write_text(pooling, encoding="utf-8")
        return folder

    return save


@pytest.fixture
def tiny_folder(tmp_path: Path, save_tiny: Callable[..., Path]) -> Callable[..., Path]:
    def make(name: str, **changes: Any) -> Path:
        return save_tiny(tmp_path / name, name, **changes)

    return make


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], Any]:
    """`load_tool("growth")`: tools/growth.py as a module."""

    def load(name: str) -> Any:
        spec: Any = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # a dataclass looks its module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def conftest_of() -> Callable[[str], Any]:
    """`conftest_of("lower")`: the helpers of another folder's tests."""

    def load(area: str) -> Any:
        spec: Any = importlib.util.spec_from_file_location(
            f"{area}_conftest", Path(__file__).parent / area / "conftest.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CPU kernels, compiled once for all tests into a cache of their own."""
    from jpq_export.runtime import native

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            return native.cpu_library()
        except native.NativeError as error:
            if "no C compiler" in str(error):
                pytest.skip(str(error))
            raise


@pytest.fixture
def kernels(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions, also those of child processes, compute in our kernels."""
    monkeypatch.setenv("JPQ_KERNELS", "on")
    monkeypatch.setenv("JPQ_CACHE", str(library.path.parents[2]))


@pytest.fixture(scope="session")
def quick_shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`with quick_shelf(name) as (folder, patch)`: an empty working folder with a cache, and `quick` for tiny models.

    `steps`: of recovery. `patch` undoes at the end what a test module changes further.
    """
    from jpq_export.compress import effort

    @contextmanager
    def make(name: str, *, steps: int = 2) -> Iterator[tuple[Path, pytest.MonkeyPatch]]:
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JPQ_CACHE", str(folder / "cache"))
            quick = effort.Effort("quick", 4, 2, 32, 1, 4, steps, (("table", (1.0,)),))
            patch.setitem(effort.EFFORTS, "quick", quick)
            patch.chdir(folder)
            yield folder, patch

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """`run("export m --bits 3 ...", expected=0)`: what the command prints, which ends with that exit code."""
    from click.testing import CliRunner

    from jpq_export.cli import main

    def invoke(command: str, expected: int = 0) -> str:
        done = CliRunner().invoke(main, shlex.split(command))
        assert done.exit_code == expected, (done.output, done.exception)
        return done.output

    return invoke
