"""A `ModelSpec` and its weights as a transformers model, which is what other quantizers take; and back."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from jpq_export.compress.families import FAMILIES, Family
from jpq_export.errors import ModelError
from jpq_export.format.spec import ModelSpec

TAKEN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
ACTIVATION = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def transformers_model(spec: ModelSpec, weights: dict[str, Tensor]) -> Any:
    """The same function as `build_decoder(spec, weights)`, fp32; ModelError for a family that is not translated."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if spec.family not in TAKEN:
        raise ModelError(
            f"{spec.name}: family {spec.family} is not translated for peers; translated: {', '.join(TAKEN)}"
        )
    first = spec.layers[0]
    windows = {layer.window for layer in spec.layers}
    facts = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": first.ffn,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": first.kv_heads * spec.heads_per_group,
        "num_key_value_heads": first.kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": ACTIVATION[spec.activation],
        "hidden_activation": ACTIVATION[spec.activation],
        "query_pre_attn_scalar": round(spec.attention_scale**-2),
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "sliding_window": max((w for w in windows if w), default=None),
        "layer_types": ["sliding_attention" if layer.window else "full_attention" for layer in spec.layers],
        "use_sliding_window": any(windows),
        "bos_token_id": spec.bos_id,
        "eos_token_id": list(spec.eos_ids) or None,
    }
    known, family = CONFIG_MAPPING[spec.family], family_of(spec)
    if spec.family != "gemma3_text":
        del facts["hidden_activation"], facts["query_pre_attn_scalar"]
    if spec.family in ("llama", "mistral"):
        del facts["layer_types"], facts["use_sliding_window"]
    if spec.family != "mistral" and not any(windows):
        facts["sliding_window"] = None
    model = AutoModelForCausalLM.from_config(known(**facts), dtype=torch.float32, attn_implementation="eager").eval()
    state = {name: weights[canonical] for name, canonical in names(spec).items()}
    for name, canonical in names(spec).items():
        if "norm" in canonical.split(".")[-1]:  # ours hold the factor itself
            state[name] = weights[canonical] - family.norm_offset
    if spec.tied:
        state["lm_head.weight"] = weights["embed"]
    model.load_state_dict(state)
    _set_rotary(model.model.rotary_emb, spec)
    return model


def _set_rotary(rotary: Any, spec: ModelSpec) -> None:
    """Our frequencies, which a configuration may state in another way; Gemma has those of its two kinds of layers."""
    kinds = {"": spec.layers[0].rope}
    if not hasattr(rotary, "inv_freq"):
        kinds = {"sliding_attention_" if layer.window else "full_attention_": layer.rope for layer in spec.layers}
    for kind, index in kinds.items():
        rope = spec.ropes[index]
        setattr(rotary, f"{kind}inv_freq", torch.tensor(rope.inv_freq))
        setattr(rotary, f"{kind}attention_scaling", rope.scaling)


def names(spec: ModelSpec) -> dict[str, str]:
    """Transformers' parameter name -> canonical name, of every weight."""
    family = family_of(spec)
    canonical = [*spec.matrices(), *spec.vectors()]
    return {_foreign(name, family): name for name in canonical}


def family_of(spec: ModelSpec) -> Family:
    """The family by the name the spec has."""
    return next(f for f in FAMILIES if f.model_type == spec.family)


def _foreign(name: str, family: Family) -> str:
    stem, kind = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
    for theirs, ours in family.top.items():
        if stem == ours:
            return f"{'' if ours == 'head' else family.base}{theirs}.{kind}"
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    assert match, name
    parts = {ours: theirs for theirs, ours in family.names.items()}
    return f"{family.base}{family.layers}.{match[1]}.{parts[match[2]]}.{kind}"
