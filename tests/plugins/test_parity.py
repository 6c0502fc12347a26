"""The CPU kernels inside `check_parity` and `OrtModel`: proved beside the function bodies, and left out when asked."""

import shutil

import numpy as np
import pytest

from jpq_export.format.bundle import Manifest, write_manifest
from jpq_export.lower.export import export_onnx
from jpq_export.numerics.scheme import TERNARY
from jpq_export.parity.check import check_parity
from jpq_export.parity.vectors import record_vectors
from jpq_export.parity.verify import verify_bundle
from jpq_export.runtime import native
from jpq_export.runtime.session import OrtModel

NARROW = (TERNARY, 1, 4, 1, TERNARY)  # the 4: where no half is added, body and kernel agree to the last bit


@pytest.fixture(scope="module", params=["llama", "pruned", "gemma", "1 bit and ternary"])
def exported(request, tmp_path_factory, conftest_of):
    tiny = conftest_of("parity")
    if request.param in tiny.SPECS:
        model = tiny.random_model(tiny.SPECS[request.param])
    else:
        model = tiny.random_model(tiny.SPECS["llama"], widths=NARROW)
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export_onnx(model, path, form="custom_op")
    return model, path, tiny.PROMPTS


def rounding_kernels(library):
    """What `native.register` would be if it let the kernels round activations to 8 bits where fp32 was asked for."""

    def register(options, activations):
        options.add_session_config_entry("jpq.activations", "int8")
        options.register_custom_ops_library(str(library.path))
        return library

    return register


def test_parity_proves_the_kernels_beside_the_bodies(kernels, exported):
    model, path, prompts = exported
    report = check_parity(model, path, prompts=prompts, steps=8)
    assert [runtime.name for runtime in report.runtimes] == ["onnxruntime", "onnxruntime-jpq-kernels"]
    assert report.passed
    for runtime in report.runtimes:
        assert runtime.logits.rel_rms < 1e-5
        assert runtime.greedy.equal == runtime.greedy.steps == 8


def test_twin_kernels_that_round_activations_do_not_pass(kernels, exported, library, monkeypatch):
    if library.implementations[0] != "avx512-vnni":
        pytest.skip("only avx512-vnni rounds")
    monkeypatch.setattr(native, "register", rounding_kernels(library))
    model, path, prompts = exported
    report = check_parity(model, path, prompts=prompts, steps=8)
    assert report.runtimes[0].passed
    assert not report.runtimes[1].passed
    assert not report.passed


def test_verify_computes_as_run_does(kernels, exported, tmp_path, monkeypatch):
    model, path, prompts = exported
    bundle = tmp_path / "bundle"
    shutil.copytree(path.parent, bundle)
    record_vectors(model, bundle / "vectors.safetensors", prompts=prompts, steps=8)
    about = {"model": {"name": "tiny"}, "target": {"name": "cpu"}, "method": "rtn"}
    manifest = Manifest(**about, bits_per_weight=3.5, weight_bytes=1, original_bytes=2)
    write_manifest(bundle, manifest.with_contents(bundle))
    assert verify_bundle(bundle).passed
    monkeypatch.setattr(native, "register", rounding_kernels(native.cpu_library()))
    report = verify_bundle(bundle)
    assert not report.passed
    assert report.first_diverging is not None


def test_a_session_says_which_kernels_run(kernels, exported, library, monkeypatch):
    _, path, prompts = exported
    ids = np.array([prompts[0]])
    ours = OrtModel(path, threads=1)
    assert f"jpq kernels ({library.implementations[0]})" in ours.path
    monkeypatch.setenv("JPQ_KERNELS", "off")
    plain = OrtModel(path, threads=1)
    assert "MatMulNBits" in plain.path
    got, expected = ours.forward(ids).logits, plain.forward(ids).logits
    assert not np.array_equal(got, expected)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_it_says_so_and_runs(exported, monkeypatch, caplog):
    def fail():
        raise native.NativeError("no C compiler")

    monkeypatch.setenv("JPQ_KERNELS", "on")
    monkeypatch.setattr(native, "cpu_library", fail)
    _, path, _ = exported
    assert "MatMulNBits" in OrtModel(path, threads=1).path
    assert "no C compiler; onnxruntime's own operators compute instead" in caplog.text
