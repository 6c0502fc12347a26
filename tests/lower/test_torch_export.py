"""The direct builder against torch.onnx.export of the same decoder: two graphs, made two ways, one result."""

import numpy as np
import pytest

from jpq_export.lower.export import export_onnx
from jpq_export.runtime.session import OrtModel

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class WithCache(torch.nn.Module):
    """The decoder with its cache as flat tensors, which is what the exporter takes."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids, attention_mask, position_ids, past):
        from jpq_export.compress.decoder import KVCache

        cache = KVCache()
        cache.layers = {i: (past[2 * i], past[2 * i + 1]) for i in range(len(past) // 2)}
        logits = self.decoder(input_ids, attention_mask, position_ids, cache)
        return logits, *(tensor for i in sorted(cache.layers) for tensor in cache.layers[i])


@pytest.fixture(scope="module")
def sessions(tiny, tmp_path_factory):
    """torch's graph and ours, of Gemma's form: the one with the most parts."""
    folder = tmp_path_factory.mktemp("torch")
    model = tiny.model(tiny.specs["gemma3"])
    spec = model.spec
    export_onnx(model, folder / "model.onnx", form="custom_op")
    past = [torch.zeros(2, layer.kv_heads, 5, spec.head_dim) for layer in spec.layers for _ in range(2)]
    ids = torch.ones(2, 3, dtype=torch.int64)
    mask, positions = torch.ones(2, 8, dtype=torch.int64), torch.arange(5, 8).repeat(2, 1)
    free = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        WithCache(tiny.decoder(model)).eval(),
        (ids, mask, positions, past),
        folder / "torch.onnx",
        dynamo=True,
        opset_version=23,
        verbose=False,
        dynamic_shapes=(
            *[{0: free, 1: free}] * 3,
            [{0: free, 2: free}] * len(past),
        ),
    )
    session = onnxruntime.InferenceSession(folder / "torch.onnx", providers=["CPUExecutionProvider"])
    return model, session, OrtModel(folder / "model.onnx", threads=1, exact=True)


@pytest.mark.parametrize(("seq", "past"), [(3, 5), (2, 9), (6, 2)])
def test_both_graphs_compute_the_same(tiny, sessions, seq, past):
    model, theirs, ours = sessions
    rng, spec = np.random.default_rng(seq), model.spec
    cache = {
        f"{i}.{part}": rng.normal(size=(3, layer.kv_heads, past, spec.head_dim)).astype(np.float32)
        for i, layer in enumerate(spec.layers)
        for part in ("key", "value")
    }
    mask = np.ones((3, past + seq), np.int64)
    mask[1, :1] = mask[2, :2] = 0
    ids, positions = rng.integers(0, spec.vocab, (3, seq)), np.maximum(mask.cumsum(-1) - 1, 0)[:, past:]
    got = ours.forward(ids, mask, past={name: value.transpose(2, 0, 1, 3) for name, value in cache.items()})
    feeds = [ids, mask, positions, *cache.values()]
    expected = theirs.run(None, dict(zip([i.name for i in theirs.get_inputs()], feeds, strict=True)))
    assert tiny.relative_rms(got.logits, expected[0]) < 3e-6
    for value, other in zip(got.past.values(), expected[1:], strict=True):
        assert tiny.relative_rms(value.transpose(1, 2, 0, 3), other) < 3e-6
    unmasked = theirs.run(
        None, dict(zip([i.name for i in theirs.get_inputs()], [ids, mask | 1, *feeds[2:]], strict=True))
    )
    assert tiny.relative_rms(got.logits, unmasked[0]) > 1e-3
