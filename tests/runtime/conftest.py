"""A tiny bundle: a random model, a word-level tokenizer, a manifest."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jpq_export.format.bundle import Manifest, write_manifest
from jpq_export.format.compressed import CompressedModel
from jpq_export.format.spec import LayerSpec, ModelSpec, RopeSpec
from jpq_export.numerics.affine import store
from jpq_export.numerics.scheme import Scheme

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(38))]
TEMPLATE = "{% for m in messages %}{{ bos_token }} {{ m['content'] }} {{ eos_token }}{% endfor %} w7"
SPEC = ModelSpec(
    name="tiny",
    family="llama",
    vocab=40,
    hidden=32,
    head_dim=16,
    heads_per_group=2,
    layers=(LayerSpec(1, 48), LayerSpec(0, 48), LayerSpec(1, 0)),
    ropes=(RopeSpec(tuple(float(f) for f in 1e4 ** (-np.arange(0, 16, 2) / 16))),),
    norm_eps=1e-5,
    activation="silu",
    tied=True,
    attention_scale=0.25,
    max_positions=24,
    bos_id=0,
    eos_ids=(1,),
)

# A model whose positions are a table instead of rotations: what lies beyond its last row must never be read.
GPT2 = replace(
    SPEC,
    family="gpt2",
    heads_per_group=1,
    ropes=(),
    activation="gelu_tanh",
    **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "layer_norm", "learned_positions"), True),
    gated=False,
)


def random_model(spec):
    rng, scheme = np.random.default_rng(3), Scheme(3, 16)
    quantized = {}
    for name, (n, k) in spec.matrices().items():
        scales = np.full((n, k // 16), 0.4 * k**-0.5, np.float16)
        quantized[name] = store(rng.integers(0, 8, (n, k)).astype(np.uint8), scales, None, scheme)
    return CompressedModel(spec, quantized, {name: np.ones(n, np.float32) for name, n in spec.vectors().items()})


def write_tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def finish(folder, name):
    """The manifest over what lies in the folder; the folder."""
    facts = {"bits_per_weight": 3.0, "weight_bytes": 1, "original_bytes": 2}
    manifest = Manifest(model={"name": name}, target={"name": "cpu"}, method="rtn", **facts)
    write_manifest(folder, manifest.with_contents(folder))
    return folder


def write_bundle(folder, spec=SPEC, words=WORDS):
    from jpq_export.lower.export import export_onnx

    folder.mkdir(exist_ok=True)
    export_onnx(random_model(spec), folder / "model.onnx", form="custom_op")
    write_tokenizer(folder, words)
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return finish(folder, "tiny")


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    """A finished bundle; do not change it."""
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def make_bundle(tmp_path):
    """Write a bundle of one's own."""
    return lambda **options: write_bundle(tmp_path / "own", **options)


@pytest.fixture(scope="session")
def model(bundle_folder):
    from jpq_export.runtime.session import OrtModel

    return OrtModel(bundle_folder / "model.onnx", threads=1)


def write_encoder_bundle(folder, *, dimension=8, positions=16):
    """A sentence encoder without attention: rows of a table, their mean under the mask, normalised."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(exist_ok=True)
    table = np.random.default_rng(5).normal(size=(len(WORDS), dimension)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask2"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask2", "last"], ["mask"]),
        helper.make_node("Mul", ["rows", "mask"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        helper.make_node("LpNormalization", ["sum"], ["embedding"], axis=1, p=2),
    ]
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "T"]) for name in ("input_ids", "attention_mask")
    ]
    out = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", dimension])]
    weights = {"table": table, "last": np.array([2]), "middle": np.array([1])}
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "encoder", ids, out, stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(proto, {"jpq.spec": json.dumps({"max_positions": positions, "vocab": len(WORDS)})})
    onnx.save(proto, folder / "model.onnx")
    write_tokenizer(folder, WORDS)
    return finish(folder, "tiny-encoder")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A finished encoder bundle."""
    return write_encoder_bundle(tmp_path_factory.mktemp("bundle") / "encoder")
