"""Recorded vectors on the device: the reader against the package's own files, the passes, and what must fail."""

import json

import numpy as np
import pytest

from jpq_export.engine.vectors import check_vectors, read_safetensors, read_vectors
from jpq_export.errors import BundleError
from jpq_export.format.tensor_file import save_tensors
from jpq_export.parity.compare import sketch


def test_reads_what_the_safetensors_package_writes(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.int64).reshape(2, 3), "a": np.array([[1.5, -2]], np.float32)}
    tensors["none"] = np.zeros((0, 4), np.float32)
    save_tensors(tmp_path / "x", tensors, meta={"format": "f"})
    read, meta = read_safetensors(tmp_path / "x")
    assert json.loads(meta["jpq"]) == {"format": "f"}
    assert sorted(read) == sorted(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_cut_file_is_one_line(tmp_path, keep):
    save_tensors(tmp_path / "x", {"a": np.ones(3, np.float32)})
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:keep])
    with pytest.raises(BundleError, match="copy the bundle again") as caught:
        read_safetensors(tmp_path / "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"data_offsets": [0, 8]}, {"data_offsets": [8, 20]}, {"data_offsets": [-4, 8]}, {"dtype": "F16"}, {"shape": [-3]}],
)
def test_a_header_that_lies_is_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **change}
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(BundleError):
        read_safetensors(tmp_path / "x")


def test_twin_the_honest_header_is_read(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    np.testing.assert_array_equal(read_safetensors(tmp_path / "x")[0]["a"], np.zeros(3, np.float32))


def test_missing_tensors_are_named(bundle, kit):
    tensors = kit.record()
    del tensors["margin"]
    kit.save_record(bundle / "vectors.safetensors", tensors)
    with pytest.raises(BundleError, match="margin is missing"):
        read_vectors(bundle / "vectors.safetensors")


def test_a_right_session_passes(bundle, kit):
    said = []
    parity = check_vectors(kit.StandIn(), bundle / "vectors.safetensors", bounds=kit.bounds, progress=said.append)
    assert parity.passed
    assert parity.reference == "pytorch 2"
    assert [row.name for row in parity.rows] == ["logits.last", "logits.prefill", "logits.padded", "logits.decode"]
    assert max(row.rel_rms for row in parity.rows) < 1e-6
    assert parity.equal == parity.steps == 6
    assert len(said) == 3


@pytest.mark.parametrize("error", [1e-2, float("nan")])
def test_twin_a_wrong_logit_fails_everywhere(bundle, kit, error):
    parity = check_vectors(kit.StandIn(error), bundle / "vectors.safetensors", bounds=kit.bounds)
    assert not parity.passed
    assert not any(row.passed for row in parity.rows)


@pytest.mark.parametrize("wrong", ["mask", "cache"])
def test_twin_ignoring_mask_or_cache_fails_where_it_matters(bundle, kit, wrong):
    class Wrong(kit.StandIn):
        def forward(self, ids, mask=None):
            if wrong == "cache" and len(ids) == 1:
                self.reset()
                mask = None
            return super().forward(ids, None if wrong == "mask" else mask)

    parity = check_vectors(Wrong(), bundle / "vectors.safetensors", bounds=kit.bounds)
    bad = {row.name for row in parity.rows if not row.passed}
    assert bad == ({"logits.padded"} if wrong == "mask" else {"logits.padded", "logits.decode"})


@pytest.mark.parametrize(("margin", "passes"), [(5e-4, True), (2e-3, False)])
def test_another_token_is_forgiven_only_at_a_tie(bundle, kit, margin, passes):
    tensors = kit.record()
    tensors["greedy"] = tensors["greedy"].copy()
    tensors["greedy"][-1] += 1  # the last one is not fed back
    tensors["margin"][-1] = margin
    kit.save_record(bundle / "vectors.safetensors", tensors)
    parity = check_vectors(kit.StandIn(), bundle / "vectors.safetensors", bounds=kit.bounds)
    assert (parity.equal, parity.tie, parity.passed) == (5, passes, passes)


def test_logits_are_folded_as_recorded(bundle, kit):
    tensors = kit.record()
    for name in ("logits.prefill", "logits.decode", "logits.padded"):
        tensors[name] = sketch(tensors[name], 16)
    kit.save_record(bundle / "vectors.safetensors", tensors)
    assert check_vectors(kit.StandIn(), bundle / "vectors.safetensors", bounds=kit.bounds).passed
    tensors["logits.prefill"] = tensors["logits.prefill"][:, ::-1].copy()
    kit.save_record(bundle / "vectors.safetensors", tensors)
    assert not check_vectors(kit.StandIn(), bundle / "vectors.safetensors", bounds=kit.bounds).passed
