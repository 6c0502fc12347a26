"""Facts about a sentence encoder (BERT family): bidirectional layers with norms after each sub-layer, then pooling."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from jpq_export.format.spec import LayerSpec, ModelSpec

KIND = "encoder"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A BERT-like sentence encoder; every linear and every norm has a bias.

    Weights (canonical names):

        embed                                  [vocab, hidden]
        positions                              [max_positions, hidden], the embedding of segment 0 added in
        embed_norm                             [hidden], bias at embed_norm.bias; likewise every norm
        layers.{i}.attn.{q,k,v,o}              [out, in], bias at layers.{i}.attn.{q,k,v,o}.bias
        layers.{i}.attn.distance               [heads * buckets], with buckets: added to scores by relative position
        layers.{i}.mlp.{up,down}               [out, in], with biases
        layers.{i}.attn_norm, layers.{i}.mlp_norm    [hidden]; they stay when their sub-layer is removed

    LayerSpec.kv_heads counts attention heads. `pooling`: "mean" over the tokens or "cls", the first one; `normalize`
    divides the embedding by its length. `pad_id` never occurs in a text. Padding stands on the right.
    """

    name: str
    family: str
    vocab: int
    hidden: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_positions: int
    norm_eps: float
    activation: str  # "gelu" | "gelu_tanh" | "relu"
    pad_id: int
    pooling: str = "mean"
    normalize: bool = True
    buckets: int = 0
    kind: str = KIND

    @property
    def heads_per_group(self) -> int:
        """Every head has keys and values of its own."""
        return 1

    @property
    def tied(self) -> bool:
        """There is no head that could share the embedding."""
        return False

    @property
    def attention_scale(self) -> float:
        """Factor on the scores."""
        return self.head_dim**-0.5

    def linear_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Shapes [out, in] of the linears of layer `index` that exist, by short name ("attn.q", "mlp.down", ...)."""
        layer = self.layers[index]
        inner = layer.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, int]] = {}
        if layer.kv_heads:
            shapes |= {f"attn.{part}": (inner, self.hidden) for part in "qkv"}
            shapes["attn.o"] = (self.hidden, inner)
        if layer.ffn:
            shapes |= {"mlp.up": (layer.ffn, self.hidden), "mlp.down": (self.hidden, layer.ffn)}
        return shapes

    def matrices(self) -> dict[str, tuple[int, int]]:
        """All weight matrices by canonical name, in graph order."""
        out = {"embed": (self.vocab, self.hidden), "positions": (self.max_positions, self.hidden)}
        for i in range(len(self.layers)):
            out |= {f"layers.{i}.{name}": shape for name, shape in self.linear_shapes(i).items()}
        return out

    def vectors(self) -> dict[str, int]:
        """All norm weights, biases and distance tables by canonical name, with their lengths."""
        out = {"embed_norm": self.hidden, "embed_norm.bias": self.hidden}
        for i, layer in enumerate(self.layers):
            for norm in ("attn_norm", "mlp_norm"):
                out |= {f"layers.{i}.{norm}": self.hidden, f"layers.{i}.{norm}.bias": self.hidden}
            out |= {f"layers.{i}.{name}.bias": rows for name, (rows, _) in self.linear_shapes(i).items()}
            if self.buckets and layer.kv_heads:
                out[f"layers.{i}.attn.distance"] = layer.kv_heads * self.buckets
        return out

    def parameters(self) -> int:
        """Number of parameters."""
        return sum(n * k for n, k in self.matrices().values()) + sum(self.vectors().values())

    def with_layers(self, layers: tuple[LayerSpec, ...]) -> EncoderSpec:
        """The same model with other per-layer widths."""
        return replace(self, layers=layers)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


Spec = ModelSpec | EncoderSpec


def spec_from_json(text: str) -> Spec:
    """Undo `to_json` of either kind; KeyError or TypeError when fields are missing or unknown."""
    raw = json.loads(text)
    if raw.get("kind") != KIND:
        return ModelSpec.from_json(text)
    raw["layers"] = tuple(LayerSpec(**layer) for layer in raw["layers"])
    return EncoderSpec(**raw)


def is_table(name: str) -> bool:
    """Whether a matrix is looked up or a head ("embed", "positions", "head") instead of lying in a layer."""
    return not name.startswith("layers.")
