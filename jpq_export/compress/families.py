"""The supported model families as facts: what their configurations mean and what their tensors are called.

The only place that knows model-type names. A new family is one more `Family` and one more row in the tests.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jpq_export.errors import ModelError, UncoveredError
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec

logger = logging.getLogger(__name__)

# Names inside a decoder layer, as transformers saves them -> canonical. `stored_layout` splits "qkv" and "gate_up".
LINEARS = {f"self_attn.{part}_proj": f"attn.{part}" for part in ("q", "k", "v", "o")} | {
    f"mlp.{part}_proj": f"mlp.{part}" for part in ("gate", "up", "down")
}
FUSED_LINEARS = {f"self_attn.{part}_proj": f"attn.{part}" for part in ("qkv", "o")} | {
    f"mlp.{part}_proj": f"mlp.{part}" for part in ("gate_up", "down")
}
QK_NORMS = {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
SANDWICH_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
GPT2_LAYER = {"attn.c_attn": "attn.qkv", "attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"} | {
    "ln_1": "attn_norm",
    "ln_2": "mlp_norm",
}
TOP = {"embed_tokens": "embed", "norm": "norm", "lm_head": "head"}
GPT2_TOP = {"wte": "embed", "wpe": "positions", "ln_f": "norm", "lm_head": "head"}
# GPT-2 spells these its own way.
GPT2_FIELDS = {
    "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # tables that old files hold beside the weights
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# Rotary types whose frequencies do not depend on the length of the text; the others cannot be one graph. Those of
# longrope change once, beyond the length the model was first trained for: up to there it is one graph.
STATIC_ROPES = ("default", "linear", "llama3", "yarn", "longrope")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class Family:
    """One model type. `names`: of a layer's tensors; `top`: of the others; both without the `base` they lie under.

    `qkv_bias`, `o_bias`, `mlp_bias`: a fixed fact, or the configuration field that decides. `norm_offset` is added to
    every norm weight as transformers stores it (Gemma multiplies by 1 + w); GGUF files hold the sum already. `nested`:
    where a multimodal wrapper keeps the language model's configuration; `ignored` are its other parts. `fields`: our
    name of a configuration field -> the family's own. `transposed`: matrices of the layers are stored [in, out].
    """

    model_type: str
    architecture: str
    gguf: str
    names: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    base: str = "model."
    layers: str = "layers"
    fields: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    norm_offset: float = 0.0
    layer_norm: bool = False
    qk_norm: bool = False
    gated: bool = True
    learned_positions: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    scaled_embedding: bool = False
    nested: str | None = None
    ignored: tuple[str, ...] = ()


_GEMMA3 = {
    "gguf": "gemma3",
    "names": LINEARS | SANDWICH_NORMS | QK_NORMS,
    "norm_offset": 1.0,
    "qk_norm": True,
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "scaled_embedding": True,
}
FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        LINEARS | PRE_NORMS,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    Family("mistral", "MistralForCausalLM", "llama", LINEARS | PRE_NORMS),
    Family("qwen2", "Qwen2ForCausalLM", "qwen2", LINEARS | PRE_NORMS, qkv_bias=True),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        LINEARS | PRE_NORMS | QK_NORMS,
        qk_norm=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
    ),
    Family("gemma3_text", "Gemma3ForCausalLM", **_GEMMA3),
    Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        nested="text_config",
        ignored=("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector."),
        **_GEMMA3,
    ),
    Family("phi3", "Phi3ForCausalLM", "phi3", FUSED_LINEARS | PRE_NORMS),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "gpt2",
        GPT2_LAYER,
        top=GPT2_TOP,
        base="transformer.",
        layers="h",
        fields=GPT2_FIELDS,
        transposed=True,
        layer_norm=True,
        gated=False,
        learned_positions=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    ),
)


def supported() -> str:
    """The list a refusal ends with."""
    return ", ".join(family.architecture for family in FAMILIES)


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a parsed config.json; ModelError names an unsupported architecture."""
    architecture = next(iter(raw.get("architectures") or ()), None)
    for family in FAMILIES:
        if architecture == family.architecture or (not architecture and raw.get("model_type") == family.model_type):
            if raw.get("quantization_config"):
                method = raw["quantization_config"].get("quant_method", "unknown")
                raise ModelError(
                    f"{where}: weights are already quantized ({method}); give the original floating-point model"
                )
            return family
    got = architecture or f"model_type {raw.get('model_type')!r}"
    if traceable(raw):
        raise UncoveredError(
            f"{where}: architecture {got} is not supported here, only `export` and `eval` take it (torch.onnx.export, "
            f"no pruning, no search); supported: {supported()}"
        )
    raise ModelError(f"{where}: architecture {got} is not supported; supported: {supported()}")


def traceable(raw: Mapping[str, Any]) -> bool:
    """Whether the configuration names a causal language model of transformers that is none of ours."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = next(iter(raw.get("architectures") or ()), None)
    if architecture in {family.architecture for family in FAMILIES} or str(architecture).endswith("Generation"):
        return False  # ours, or a multimodal wrapper
    return architecture == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(raw.get("model_type"), False)


def gguf_family(architecture: str, where: str) -> Family:
    """The family of a GGUF file's general.architecture."""
    for family in FAMILIES:
        if family.gguf == architecture:
            return family
    known = ", ".join(sorted({family.gguf for family in FAMILIES}))
    raise ModelError(f"{where}: GGUF architecture {architecture!r} is not supported; supported: {known}")


def parse_config(raw: Mapping[str, Any], family: Family, where: str) -> Any:
    """The configuration as transformers reads it: defaults and old spellings filled in, types validated."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    text = raw.get(family.nested) if family.nested else raw
    if not isinstance(text, dict):
        raise ModelError(f"{where}: no {family.nested} in the configuration; download the model again")
    model_type = "gemma3_text" if family.nested else family.model_type
    text = {k: v for k, v in text.items() if k not in ("model_type", "architectures", "quantization_config")}
    try:
        config = CONFIG_MAPPING[model_type].from_dict(text)
        for ours, theirs in family.fields.items():
            setattr(config, ours, getattr(config, theirs))
        return config
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{where}: bad configuration ({reason}); download the model again") from error


def spec_of(config: Any, family: Family, *, name: str, where: str) -> ModelSpec:
    """`ModelSpec` of a transformers configuration; ModelError names what cannot be expressed."""
    refuse_unsupported(config, where)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    ffn = 4 * config.hidden_size if config.intermediate_size is None else config.intermediate_size  # None: GPT-2's way
    if min(heads, kv_heads, config.hidden_size, ffn, config.vocab_size) < 1 or heads % kv_heads:
        raise ModelError(
            f"{where}: {heads} attention heads, {kv_heads} key/value heads, hidden size {config.hidden_size}: expected "
            "positive sizes and a whole number of query heads per key/value head; download the model again"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    ropes, rope_of = ((), {}) if family.learned_positions else ropes_of(config, head_dim, where)
    layers = tuple(
        LayerSpec(kv_heads, ffn, window, rope_of.get(kind, 0)) for kind, window in layer_windows(config, where)
    )

    def fact(value: bool | str) -> bool:
        return bool(getattr(config, value, False)) if isinstance(value, str) else value

    return ModelSpec(
        name=name,
        family=family.model_type,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        head_dim=head_dim,
        heads_per_group=heads // kv_heads,
        layers=layers,
        ropes=ropes,
        norm_eps=config.rms_norm_eps,
        activation=ACTIVATIONS[activation_of(config)],
        tied=bool(config.tie_word_embeddings),
        attention_scale=attention_scale(config, head_dim),
        embed_scale=float(config.hidden_size**0.5) if family.scaled_embedding else 1.0,
        qk_norm=family.qk_norm,
        post_norms="attn_post_norm" in family.names.values(),
        qkv_bias=fact(family.qkv_bias),
        o_bias=fact(family.o_bias),
        mlp_bias=fact(family.mlp_bias),
        max_positions=longest_text(config, where),
        bos_id=config.bos_token_id,
        eos_ids=id_tuple(config.eos_token_id),
        layer_norm=family.layer_norm,
        gated=family.gated,
        learned_positions=family.learned_positions,
    )


def attention_scale(config: Any, head_dim: int) -> float:
    """Factor on the scores; GPT-2 may go without."""
    if not getattr(config, "scale_attn_weights", True):
        return 1.0
    return float((getattr(config, "query_pre_attn_scalar", None) or head_dim) ** -0.5)


def longest_text(config: Any, where: str) -> int:
    """Positions the model's fixed angles are right for: all, but with longrope only those of its short factors."""
    most, parameters = config.max_position_embeddings, getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return most
    short = min(most, parameters["original_max_position_embeddings"])
    logger.warning(
        "%s: longrope: exported for texts of up to %d tokens, not %d (its short factors)", where, short, most
    )
    return short


def id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids as configurations write them: one, several, or none."""
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def activation_of(config: Any) -> str:
    """The MLP's activation as the family spells it."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def refuse_unsupported(config: Any, where: str) -> None:
    """Options the decoder does not compute."""
    if activation_of(config) not in ACTIVATIONS:
        raise ModelError(
            f"{where}: activation {activation_of(config)!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    for option in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_bidirectional_attention",
        "scale_attn_by_inverse_layer_idx",
        "add_cross_attention",
    ):
        if getattr(config, option, None):
            raise ModelError(f"{where}: {option}={getattr(config, option)} is not supported; expected none")


def layer_windows(config: Any, where: str) -> list[tuple[str, int | None]]:
    """Kind and sliding window of every layer."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Llama has no window, Mistral has one for all layers
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if len(kinds) != config.num_hidden_layers or set(kinds) - set(LAYER_TYPES):
        raise ModelError(
            f"{where}: layer_types holds {len(kinds)} entries of {', '.join(sorted(set(kinds)))}; expected "
            f"{config.num_hidden_layers} of {', '.join(LAYER_TYPES)}"
        )
    if "sliding_attention" in kinds and not window:
        raise ModelError(f"{where}: layer_types asks for sliding_attention, sliding_window is {window}")
    return [(kind, window if kind == "sliding_attention" else None) for kind in kinds]


def ropes_of(config: Any, head_dim: int, where: str) -> tuple[tuple[RopeSpec, ...], dict[str, int]]:
    """All rotary tables, and which layer kind uses which (families with one table: every kind uses 0)."""
    parameters = config.rope_parameters
    if "rope_type" in parameters:
        return (rope_of_type(config, parameters, head_dim, where),), {}
    kinds = [kind for kind in LAYER_TYPES if kind in set(config.layer_types)]
    ropes = tuple(rope_of_type(config, parameters[kind], head_dim, where, layer_type=kind) for kind in kinds)
    return ropes, {kind: i for i, kind in enumerate(kinds)}


def rope_of_type(
    config: Any, parameters: Mapping[str, Any], head_dim: int, where: str, *, layer_type: str | None = None
) -> RopeSpec:
    """Frequencies [head_dim / 2] and the factor on cos and sin, in fp32 as transformers computes them."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters["rope_type"]
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{where}: partial_rotary_factor {parameters['partial_rotary_factor']} is not supported")
    if kind not in STATIC_ROPES:
        raise ModelError(
            f"{where}: rope type {kind!r} is not supported, its angles depend on the text's length; "
            f"supported: {', '.join(STATIC_ROPES)}"
        )
    try:
        if kind == "default":
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponent), 1.0
        else:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: rope {kind!r} lacks or misstates {error}; download the model again") from error
    if len(inv_freq) * 2 != head_dim or not torch.isfinite(inv_freq).all():
        raise ModelError(
            f"{where}: rope {kind!r} gives {len(inv_freq)} frequencies, expected {head_dim // 2} finite ones; "
            "download the model again"
        )
    return RopeSpec(tuple(inv_freq.tolist()), float(scaling))


def canonical(name: str, family: Family) -> str | None:
    """A checkpoint's tensor name -> canonical name, None for a part that is not the language model's.

    KeyError for a name the family does not have.
    """
    if name.startswith(family.ignored) or name.endswith(BUFFERS):
        return None
    # Multimodal wrappers: "language_model.model.x" (old), "model.language_model.x" (new).
    if family.nested:
        name = name.replace("model.language_model.", "model.", 1).removeprefix("language_model.")
    stem, _, kind = name.removeprefix(family.base).rpartition(".")  # GPT-2's own files leave the base out
    suffix = {"weight": "", "bias": ".bias"}[kind]
    if stem in family.top:
        return family.top[stem] + suffix
    match = re.fullmatch(rf"{family.layers}\.(\d+)\.(.+)", stem)
    if not match:
        raise KeyError(name)
    index, part = match.groups()
    return f"layers.{index}.{family.names[part]}{suffix}"
