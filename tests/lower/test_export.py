"""Exported graphs against the PyTorch decoder: every family, both forms, prefill, cached decoding, padded batches."""

import numpy as np
import pytest

from jpq_export.lower.export import export_onnx
from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.scheme import ALL_WIDTHS, Scheme
from jpq_export.runtime.session import OrtModel

torch = pytest.importorskip("torch")

# fp32 against fp32 in another order of sums, over 2-5 layers: 3e-7 to 6e-7 was seen. The faults below are above 1e-3.
BOUND = 3e-6
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "gpt2", "biases", "pruned"]
# The last two: only basic operators; and what lies between two attentions as one operator.
KINDS = [("custom_op", None), ("qdq", None), ("custom_op", "10.7"), ("chained", None)]


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """The compressed model, its decoder and its graph in onnxruntime; made once for each family and form."""
    made = {}

    def get(family, form, tensorrt=None):
        key = family, form, tensorrt
        if key not in made:
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            model = tiny.model(tiny.specs[family])
            whole = {"form": "custom_op", "chained": True} if form == "chained" else {"form": form}
            export_onnx(model, path, **whole, tensorrt=tensorrt, taps=True)
            made[key] = model, tiny.decoder(model), OrtModel(path, threads=1, exact=True)
        return made[key]

    return get


def tokens(shape, seed=1):
    return np.random.default_rng(seed).integers(0, 96, shape)


def reference(decoder, ids, mask=None, cache=None, taps=None):
    tap = None if taps is None else lambda name, value: taps.__setitem__(name, value.numpy())
    mask = None if mask is None else torch.from_numpy(mask)
    with torch.no_grad():
        return decoder(torch.from_numpy(ids), attention_mask=mask, cache=cache, tap=tap).numpy()


@pytest.mark.parametrize(("form", "tensorrt"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_every_tap(tiny, exported, family, form, tensorrt):
    model, decoder, ort = exported(family, form, tensorrt)
    ids, taps = tokens((2, 9)), {}
    expected = reference(decoder, ids, taps=taps)
    names = {"embed", "norm"} | {f"layers.{i}.attn" for i, layer in enumerate(model.spec.layers) if layer.kv_heads}
    names |= {f"layers.{i}.mlp" for i, layer in enumerate(model.spec.layers) if layer.ffn}
    got = ort.forward(ids, outputs=sorted(names))
    assert tiny.relative_rms(got.logits, expected) < BOUND
    assert {name: tiny.relative_rms(got.values[name], taps[name]) < BOUND for name in names} == dict.fromkeys(
        names, True
    )
    assert names == set(ort.outputs) - {"logits"} - {f"present.{name}" for name in got.past}


@pytest.mark.parametrize(("form", "tensorrt"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_decode_steps_through_the_cache(tiny, exported, family, form, tensorrt):
    from jpq_export.compress.decoder import KVCache

    _, decoder, ort = exported(family, form, tensorrt)
    ids, cache = tokens((1, 5)), KVCache()
    expected, got = reference(decoder, ids, cache=cache), ort.forward(ids)
    decoding = ort.start()
    last = decoding.step(ids[0])
    for _ in range(16):
        assert tiny.relative_rms(got.logits, expected) < BOUND
        assert tiny.relative_rms(last, expected[0, -1]) < BOUND
        ids = expected[:, -1:].argmax(-1)
        expected, got = reference(decoder, ids, cache=cache), ort.forward(ids, past=got.past)
        last = decoding.step(ids[0])
    for index, (key, value) in cache.layers.items():
        for part, expected in (("key", key), ("value", value)):
            for rows in (ort.cache.rows(got.past[f"{index}.{part}"]), decoding.cache.rows(f"{index}.{part}")):
                np.testing.assert_allclose(rows, expected.numpy().swapaxes(1, 2), rtol=1e-3, atol=1e-5)


def left_padded(lengths, width):
    return (np.arange(width) >= width - np.array(lengths)[:, None]).astype(np.int64)


@pytest.mark.parametrize(("form", "tensorrt"), KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_each_row_alone(tiny, exported, family, form, tensorrt):
    _, decoder, ort = exported(family, form, tensorrt)
    lengths, ids = [9, 6, 2], tokens((3, 9))
    mask = left_padded(lengths, 9)
    got = ort.forward(ids, mask)
    more = tokens((3, 4), seed=2)  # then several tokens at once after a padded past
    longer = np.concatenate([mask, np.ones_like(more)], 1)
    after = ort.forward(more, longer, past=got.past)
    for row, length in enumerate(lengths):
        alone = np.concatenate([ids[row, -length:], more[row]])[None]
        expected = reference(decoder, alone)[0]
        assert tiny.relative_rms(got.logits[row, -length:], expected[:length]) < BOUND
        assert tiny.relative_rms(after.logits[row], expected[length:]) < BOUND


def test_padding_that_is_not_masked_is_seen(tiny, exported):
    """Twin: without the mask, a padded row gives something else."""
    _, decoder, ort = exported("llama", "custom_op")
    ids = tokens((3, 9))
    expected = reference(decoder, ids[2:, -2:])[0]
    positions = np.maximum(left_padded([9, 6, 2], 9).cumsum(-1) - 1, 0)
    got = ort.forward(ids, position_ids=positions).logits[2, -2:]
    assert tiny.relative_rms(got, expected) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_matter(tiny, exported, family):
    """Twin: positions counted from the padding change the result (rotation is relative, so stretch them)."""
    _, decoder, ort = exported(family, "custom_op")
    ids = tokens((1, 9))
    stretched = ort.forward(ids, position_ids=2 * np.arange(9)[None])
    assert tiny.relative_rms(stretched.logits, reference(decoder, ids)) > 1e-3


def test_the_window_matters(tiny, exported):
    """Twin: Gemma without its window is another model beyond 4 tokens, and the same one within them."""
    from dataclasses import replace

    model, _, ort = exported("gemma3", "custom_op")
    unbounded = model.spec.with_layers(tuple(replace(layer, window=None) for layer in model.spec.layers))
    wide = tiny.decoder(replace(model, spec=unbounded))
    assert tiny.relative_rms(ort.forward(tokens((1, 9))).logits, reference(wide, tokens((1, 9)))) > 1e-3
    assert tiny.relative_rms(ort.forward(tokens((1, 4))).logits, reference(wide, tokens((1, 4)))) < BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["swapped kv heads", "scales shifted", "norm missing"])
def test_a_wrong_weight_is_seen(tiny, exported, family, fault, tmp_path):
    """Twin: an export of a damaged model is far from the undamaged decoder."""
    model, decoder, _ = exported(family, "custom_op")
    path = tmp_path / "damaged.onnx"
    export_onnx(damage(model, fault), path, form="custom_op")
    got = OrtModel(path, threads=1, exact=True).forward(tokens((1, 9))).logits
    assert tiny.relative_rms(got, reference(decoder, tokens((1, 9)))) > 1e-3


def damage(model, fault):
    from dataclasses import replace

    quantized, vectors = dict(model.quantized), dict(model.vectors)
    value = quantized["layers.0.attn.v"]
    if fault == "swapped kv heads":
        rows = np.roll(np.arange(len(value.packed)), 16 if len(value.packed) > 16 else 1)
        zeros = None if value.zeros is None else value.zeros[rows]
        value = replace(value, packed=value.packed[rows], scales=value.scales[rows], zeros=zeros)
    elif fault == "scales shifted":
        value = replace(value, scales=np.roll(value.scales, 1, axis=1))
    else:
        vectors["layers.0.attn_norm"] = np.ones_like(vectors["layers.0.attn_norm"])
    return replace(model, quantized=quantized | {"layers.0.attn.v": value}, vectors=vectors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["custom_op", "qdq"])
@pytest.mark.parametrize("bits", ALL_WIDTHS)
def test_every_width_through_a_whole_model(tiny, tmp_path, bits, form, symmetric):
    model = tiny.model(tiny.specs["llama"], lambda name, index: Scheme(bits, 32, symmetric))
    export_onnx(model, tmp_path / "model.onnx", form=form)
    got = OrtModel(tmp_path / "model.onnx", threads=1, exact=True).forward(tokens((2, 7)))
    assert tiny.relative_rms(got.logits, reference(tiny.decoder(model), tokens((2, 7)))) < BOUND


@pytest.mark.parametrize("form", ["custom_op", "qdq"])
@pytest.mark.parametrize("bits", NORMAL_WIDTHS)
def test_normal_levels_through_a_whole_model(tiny, tmp_path, bits, form):
    model = tiny.model(tiny.specs["llama"], lambda name, index: Scheme(bits, 32, normal=True))
    export_onnx(model, tmp_path / "model.onnx", form=form)
    got = OrtModel(tmp_path / "model.onnx", threads=1, exact=True).forward(tokens((2, 7)))
    assert tiny.relative_rms(got.logits, reference(tiny.decoder(model), tokens((2, 7)))) < BOUND


@pytest.mark.parametrize("group_size", [4, 12, 24])
def test_group_sizes_without_a_kernel(tiny, tmp_path, group_size):
    from dataclasses import replace

    spec = replace(tiny.specs["llama"], hidden=48, head_dim=12, attention_scale=0.3)
    spec = replace(spec, ropes=(replace(spec.ropes[0], inv_freq=spec.ropes[0].inv_freq[:6]),))
    model = tiny.model(spec, lambda name, index: Scheme(3, group_size))
    for form in ("custom_op", "qdq"):
        export_onnx(model, tmp_path / "model.onnx", form=form)
        ort = OrtModel(tmp_path / "model.onnx", threads=1, exact=True)
        assert "unpacked to fp32" in ort.path
        expected = reference(tiny.decoder(model), tokens((2, 7)))
        assert tiny.relative_rms(ort.forward(tokens((2, 7))).logits, expected) < BOUND


def test_activations_of_8_bits_are_close_but_not_exact(tiny, tmp_path):
    """The default session is another function: `exact` is needed to compare."""
    model = tiny.model(tiny.specs["llama"], lambda name, index: Scheme(4, 32, symmetric=False))
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    fast, exact = (OrtModel(tmp_path / "model.onnx", threads=1, exact=flag) for flag in (False, True))
    assert "8 bits" in fast.path
    assert "fp32" in exact.path
    error = tiny.relative_rms(fast.forward(tokens((1, 9))).logits, exact.forward(tokens((1, 9))).logits)
    assert 1e-4 < error < 0.1


def test_a_model_of_an_embedding_alone(tiny, tmp_path):
    """All sub-layers removed: no cache, no mask, and the graph still loads."""
    from dataclasses import replace

    from jpq_export.format.spec import LayerSpec

    model = tiny.model(replace(tiny.specs["llama"], layers=(LayerSpec(0, 0),)))
    export_onnx(model, tmp_path / "model.onnx", form="custom_op")
    got = OrtModel(tmp_path / "model.onnx", threads=1, exact=True).forward(tokens((1, 5)))
    assert got.past == {}
    assert tiny.relative_rms(got.logits, reference(tiny.decoder(model), tokens((1, 5)))) < BOUND
