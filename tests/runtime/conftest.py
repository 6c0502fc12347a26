"""A tiny bundle: a random model, a word-level tokenizer, a manifest."""

import json

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


def random_model(spec):
    rng, scheme = np.random.default_rng(3), Scheme(3, 16)
    quantized = {}
    for name, (n, k) in spec.matrices().items():
        scales = np.full((n, k // 16), 0.4 * k**-0.5, np.float16)
        quantized[name] = store(rng.integers(0, 8, (n, k)).astype(np.uint8), scales, None, scheme)
    return CompressedModel(spec, quantized, {name: np.ones(n, np.float32) for name, n in spec.vectors().items()})


def write_bundle(folder, spec=SPEC, words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from jpq_export.lower.export import export_onnx

    folder.mkdir(exist_ok=True)
    export_onnx(random_model(spec), folder / "model.onnx", form="custom_op")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    manifest = Manifest(
        model={"name": "tiny"},
        target={"name": "cpu"},
        method="rtn",
        bits_per_weight=3.0,
        weight_bytes=1,
        original_bytes=2,
    )
    write_manifest(folder, manifest.with_contents(folder))
    return folder


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
