"""Facts about a decoder: everything the graph builders, the cost model and the runtimes need to know of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

FLOAT_CACHE, INT8_CACHE = "float", "int8"
LOGITS_FROM = "logits_from"  # an input with a default: the first new token whose logits are wanted, int64 [1]
LOGITS_AT = "logits_at"  # an input: which new tokens' logits are wanted, counted from the first new one, int64 [wanted]
KV_CACHES = (FLOAT_CACHE, INT8_CACHE)
FLOAT_ACTIVATIONS, INT8_ACTIVATIONS = "float", "int8"
ACTIVATIONS = (FLOAT_ACTIVATIONS, INT8_ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer's own widths; zero means the sub-layer was removed.

    `kv_heads`: key/value heads kept. Query heads are kv_heads * ModelSpec.heads_per_group. `ffn`: MLP channels kept.
    `window`: sliding attention window in tokens (a query sees keys with position > its own - window), None for full.
    `rope`: index into ModelSpec.ropes.
    """

    kv_heads: int
    ffn: int
    window: int | None = None
    rope: int = 0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding (rotate-half form): angle = position * inv_freq, cos and sin multiplied by `scaling`."""

    inv_freq: tuple[float, ...]
    scaling: float = 1.0


# Written only where they are not the default: models without them keep the identity (weights_sha256) they had before
# these facts existed, so that their plans and caches stay good.
LATER_FACTS = {"kv_cache": FLOAT_CACHE, "layer_norm": False, "gated": True, "learned_positions": False, "traced": None}
LATER_FACTS |= {"activations": FLOAT_ACTIVATIONS, "rotated": False}
LARGEST_HADAMARD = 128


def rotation_sizes(hidden: int) -> tuple[int, int]:
    """(a, b) with a * b = hidden: the sizes of the two factors of a rotation, b a power of two."""
    b = 1
    while hidden % (2 * b) == 0 and 2 * b <= LARGEST_HADAMARD:
        b *= 2
    return hidden // b, b


@dataclass(frozen=True, slots=True)
class Traced:
    """What is known of a model whose graph torch.onnx.export traced.

    `matrices`: (name, rows, columns) of every weight that is stored packed, called as transformers calls its module;
    `tables`: those of them that are looked up, or the head; `others`: number of all other parameters.
    """

    matrices: tuple[tuple[str, int, int], ...]
    tables: tuple[str, ...]
    others: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder with norms before its sub-layers: Llama and its relatives, and GPT-2.

    Weights (canonical names; `weight` matrices are [out, in], norms hold the factor actually multiplied, so Gemma's
    1 + w is already added):

        embed                                  [vocab, hidden]
        positions                              [max_positions, hidden], only with learned_positions
        layers.{i}.attn_norm, layers.{i}.mlp_norm              [hidden]
        layers.{i}.attn_post_norm, layers.{i}.mlp_post_norm    [hidden], only with post_norms
        layers.{i}.attn.{q,k,v,o}              [out, in], bias at layers.{i}.attn.{q,k,v,o}.bias
        layers.{i}.attn.{q_norm,k_norm}        [head_dim], only with qk_norm
        layers.{i}.mlp.{gate,up,down}          [out, in], bias at layers.{i}.mlp.{gate,up,down}.bias; gate only if gated
        norm                                   [hidden]
        head                                   [vocab, hidden], only when not tied
        rotation.outer, rotation.inner         [a * a], [b * b], only if rotated, see `rotation_sizes`

    Query head j reads key/value head j // heads_per_group. No `ropes`: queries and keys are not rotated. `layer_norm`:
    norms subtract the mean and have a bias at "<norm>.bias". Not `gated`: down(act(up(x))) instead of
    down(act(gate(x)) * up(x)). `learned_positions`: a row of `positions` is added to every embedded token.

    `kv_cache`: how keys (after rotary) and values are kept. "float": as computed. "int8": each (position, head) as
    codes round(x / scale) with scale = max |x| / 127 in fp32; attention reads codes * scale, of new tokens too, so it
    does not matter in how many passes a text is read.

    `activations`: what the linears of the layers (not the head) multiply. "float": their input as it is. "int8": every
    token of it as codes round(x / step) with step = max |x| / 127 in fp32; the product of codes is one of integers.

    `rotated`: embedding, stream and head have the basis x (A ⊗ B) instead of x, with orthogonal A [a, a],
    `rotation.outer` by rows, and B [b, b], `rotation.inner`. All weights are made for it but the last norm's: the
    stream is turned back before that norm, and what it gives into the head's basis again. With `post_norms` the stream
    stays in its basis (`turned_reads`): what linears and head read is turned behind their norms, and an embedding back.

    `traced`: the graph is no decoder of this form but one that torch.onnx.export traced. Vocabulary, positions, token
    ids and cache (head_dim, kv_heads and window of every layer) are facts then; everything else is not and lies at 0.
    """

    name: str
    family: str
    vocab: int
    hidden: int
    head_dim: int
    heads_per_group: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    norm_eps: float
    activation: str  # "silu" | "gelu_tanh"
    tied: bool
    attention_scale: float
    embed_scale: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    max_positions: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    kv_cache: str = FLOAT_CACHE
    layer_norm: bool = False
    gated: bool = True
    learned_positions: bool = False
    activations: str = FLOAT_ACTIVATIONS
    traced: Traced | None = None
    rotated: bool = False

    def __post_init__(self) -> None:
        """Check: a kind of cache or activations that this version does not know is a ValueError."""
        if self.kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache: expected one of {', '.join(KV_CACHES)}, got {self.kv_cache!r}")
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"activations: expected one of {', '.join(ACTIVATIONS)}, got {self.activations!r}")

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of the linears of layer `index` that exist, by short name ("attn.q", "mlp.down", ...)."""
        layer = self.layers[index]
        shapes: dict[str, tuple[int, int]] = {}
        if layer.kv_heads:
            kv = layer.kv_heads * self.head_dim
            q = kv * self.heads_per_group
            shapes |= {
                "attn.q": (q, self.hidden),
                "attn.k": (kv, self.hidden),
                "attn.v": (kv, self.hidden),
                "attn.o": (self.hidden, q),
            }
        if layer.ffn:
            shapes |= {"mlp.gate": (layer.ffn, self.hidden)} if self.gated else {}
            shapes |= {"mlp.up": (layer.ffn, self.hidden), "mlp.down": (self.hidden, layer.ffn)}
        return shapes

    def matrices(self) -> dict[str, tuple[int, int]]:
        """All weight matrices by canonical name, embedding and (untied) head included, in graph order."""
        if self.traced:
            return {name: (rows, columns) for name, rows, columns in self.traced.matrices}
        out = {"embed": (self.vocab, self.hidden)}
        if self.learned_positions:
            out["positions"] = (self.max_positions, self.hidden)
        for i in range(len(self.layers)):
            out |= {f"layers.{i}.{name}": shape for name, shape in self.linear_shapes(i).items()}
        if not self.tied:
            out["head"] = (self.vocab, self.hidden)
        return out

    def vectors(self) -> dict[str, int]:
        """All norm weights and biases by canonical name, with their lengths; not known of a traced model."""
        out: dict[str, int] = {}
        if self.traced:
            return out
        for i, layer in enumerate(self.layers):
            at = f"layers.{i}"
            if layer.kv_heads:
                out |= self._norm(f"{at}.attn_norm")
                if self.qk_norm:
                    out[f"{at}.attn.q_norm"] = out[f"{at}.attn.k_norm"] = self.head_dim
                if self.post_norms:
                    out |= self._norm(f"{at}.attn_post_norm")
            if layer.ffn:
                out |= self._norm(f"{at}.mlp_norm")
                if self.post_norms:
                    out |= self._norm(f"{at}.mlp_post_norm")
            for name, (rows, _) in self.linear_shapes(i).items():
                part = name.split(".")[1]
                has = {"q": self.qkv_bias, "k": self.qkv_bias, "v": self.qkv_bias, "o": self.o_bias}
                if has.get(part, self.mlp_bias):
                    out[f"{at}.{name}.bias"] = rows
        if self.rotated:
            out |= {
                f"rotation.{part}": size**2
                for part, size in zip(("outer", "inner"), rotation_sizes(self.hidden), strict=True)
            }
        return out | self._norm("norm")

    def _norm(self, name: str) -> dict[str, int]:
        return dict.fromkeys([name, f"{name}.bias"] if self.layer_norm else [name], self.hidden)

    @property
    def turned_reads(self) -> bool:
        """Whether not the stream is in another basis, but what is read of it."""
        return self.rotated and self.post_norms

    def parameters(self) -> int:
        """Number of parameters, tied weights counted once; a rotation is none of the model's."""
        own = (size for name, size in self.vectors().items() if not name.startswith("rotation."))
        others = self.traced.others if self.traced else sum(own)
        return sum(n * k for n, k in self.matrices().values()) + others

    def cache_bytes(self, kv_heads: int, *, float_bytes: int = 4) -> int:
        """Bytes of one token's keys and values in `kv_heads` heads; a float cache has `float_bytes` a number."""
        head = self.head_dim + 4 if self.kv_cache == INT8_CACHE else self.head_dim * float_bytes
        return 2 * kv_heads * head

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers of model.onnx."""
        return self.cache_bytes(sum(layer.kv_heads for layer in self.layers))

    def with_layers(self, layers: tuple[LayerSpec, ...]) -> ModelSpec:
        """The same model with other per-layer widths."""
        return replace(self, layers=layers)

    def to_json(self) -> str:
        """One line of JSON."""
        facts = asdict(self)
        for key, default in LATER_FACTS.items():
            if facts[key] == default:
                del facts[key]
        return json.dumps(facts, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> ModelSpec:
        """Undo `to_json`; KeyError or TypeError when fields are missing or unknown."""
        raw = json.loads(text)
        raw["layers"] = tuple(LayerSpec(**layer) for layer in raw["layers"])
        raw["ropes"] = tuple(RopeSpec(tuple(r["inv_freq"]), r["scaling"]) for r in raw["ropes"])
        raw["eos_ids"] = tuple(raw["eos_ids"])
        if (traced := raw.get("traced")) is not None:
            matrices = tuple((str(name), int(rows), int(columns)) for name, rows, columns in traced["matrices"])
            raw["traced"] = Traced(matrices, tuple(traced["tables"]), int(traced["others"]))
        return ModelSpec(**raw)
