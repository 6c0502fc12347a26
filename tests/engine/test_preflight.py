"""Preflight against described boards: every reason to refuse is named with its remedy, several at once."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jpq_export.engine.plugin import recorded
from jpq_export.engine.preflight import Check, dialect_start, failures, preflight
from jpq_export.engine.settings import Settings, memory_terms
from jpq_export.errors import UsageError
from jpq_export.format.bundle import Manifest, read_manifest, write_manifest
from jpq_export.format.spec import ModelSpec
from jpq_export.lower.export import dialect_for

NO_TOOLS: dict[str, str] = {}


def checks_of(bundle: Path, board, settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in preflight(read_manifest(bundle), board, settings)}


def failed(bundle: Path, board, settings: Settings) -> set[str]:
    return {name for name, check in checks_of(bundle, board, settings).items() if not check.passed}


def test_a_good_board_passes_every_check(bundle, board, settings):
    checks = checks_of(bundle, board, settings)
    assert [name for name, check in checks.items() if not check.passed] == []
    assert list(checks) == ["bundle", "graph", "tensorrt", "gpu", "plugin", "profiles", "memory", "disk"]
    assert failures(list(checks.values())) is None
    assert all(check.got and check.needed and not check.remedy for check in checks.values())


BAD_BOARDS = [
    ("tensorrt", {"tensorrt": "8.6.2"}, "update JetPack to 6.1"),
    ("tensorrt", {"tensorrt": None, "tensorrt_missing": "No module named 'tensorrt'"}, "sudo apt install"),
    ("gpu", {"gpu_missing": "CUDA driver: libcuda.so.1 not found", "sm": None}, "on the board"),
    ("plugin", {"tools": NO_TOOLS}, "install the compilers"),
    ("memory", {"free_memory_bytes": 500_000_000}, "--max-tokens"),
    ("memory", {"free_memory_bytes": None}, "on the board"),
    ("disk", {"free_disk_bytes": 200_000_000}, "--out"),
]


@pytest.mark.parametrize(("name", "change", "remedy"), BAD_BOARDS)
def test_one_thing_wrong_fails_one_check_with_its_remedy(bundle, board, settings, name, change, remedy):
    checks = checks_of(bundle, replace(board, **change), settings)
    assert [check.name for check in checks.values() if not check.passed] == [name]
    assert remedy in checks[name].remedy
    assert checks[name].line.startswith(f"FAIL {name}: got ")
    assert "\n" not in checks[name].line


def test_everything_wrong_is_reported_at_once(bundle, board, settings):
    bad = {key: value for _, change, _ in BAD_BOARDS[1:] for key, value in change.items()}
    bad["free_memory_bytes"] = 1
    (bundle / "model.trt.onnx").write_bytes(b"other")
    checks = checks_of(bundle, replace(board, **bad), settings)
    assert {name for name, check in checks.items() if not check.passed} == {
        *("bundle", "tensorrt", "gpu", "plugin", "memory", "disk")
    }
    line = failures(list(checks.values()))
    assert line is not None
    assert line.startswith("6 of 8 checks failed (bundle, tensorrt, gpu, plugin, memory, disk)")


def test_a_damaged_file_is_named(bundle, board, settings):
    (bundle / "plugins" / "core" / "low_bit.h").write_text("changed")
    check = checks_of(bundle, board, settings)["bundle"]
    assert not check.passed
    assert "plugins/core/low_bit.h" in check.got


@pytest.mark.parametrize(
    ("written", "here", "passes"),
    [
        ("10.3", "10.3.0.30", True),
        ("10.3", "10.16.1", True),
        ("10.3", "11.4.1", True),
        ("10.6", "10.3.0", True),
        ("10.13", "10.3.0", False),
        ("10.13", "10.7.0", True),
        ("10.16", "10.13.0", False),
        ("10.16", "10.15.0", True),
        ("10.3", "10.2.0", False),
    ],
)
def test_tensorrt_reads_graphs_of_its_own_dialect_and_older_ones(bundle, board, settings, written, here, passes):
    manifest = read_manifest(bundle)
    write_manifest(bundle, replace(manifest, device={**(manifest.device or {}), "tensorrt": written}))
    check = checks_of(bundle, replace(board, tensorrt=here), settings)["tensorrt"]
    assert check.passed is passes
    assert written in check.needed


def test_dialects_start_where_the_exporter_changes_them():
    versions = [f"10.{minor}" for minor in range(3, 20)] + ["11.0", "11.4"]
    for first, second in pairwise(versions):
        same = dialect_for(first) == dialect_for(second)
        assert same == (dialect_start(first) == dialect_start(second)), (first, second)


def test_a_prebuilt_library_of_this_gpu_needs_no_compiler(bundle, board, settings, prebuilt):
    prebuilt(sms=(87, 110))
    assert failed(bundle, replace(board, tools=NO_TOOLS), settings) == set()
    assert failed(bundle, replace(board, tools=NO_TOOLS, sm=110), settings) == set()


def test_twin_a_prebuilt_library_of_another_gpu_does(bundle, board, settings, prebuilt):
    prebuilt(sms=(87,))
    other = replace(board, tools=NO_TOOLS, sm=110)
    check = checks_of(bundle, other, settings)["plugin"]
    assert not check.passed
    assert "for sm_87" in check.got
    assert "sm_110" in check.needed
    assert failed(bundle, replace(board, sm=110), settings) == set()  # compiled for it


@pytest.mark.parametrize(("change", "word"), [({"abi": 2}, "ABI 2"), ({"sms": (89,)}, "sm_89")])
def test_a_library_of_another_abi_or_gpu_is_refused(bundle, board, settings, prebuilt, change, word):
    prebuilt(**change)
    check = checks_of(bundle, replace(board, tools=NO_TOOLS), settings)["plugin"]
    assert not check.passed
    assert word in check.got


def test_a_library_for_another_processor_is_refused(bundle, board, settings, prebuilt):
    prebuilt()
    check = checks_of(bundle, replace(board, tools=NO_TOOLS, machine="riscv64"), settings)["plugin"]
    assert not check.passed


def test_a_touched_library_is_refused_even_with_compilers(bundle, board, settings, prebuilt):
    path = prebuilt()
    assert failed(bundle, board, settings) == set()
    path.write_bytes(b"librarY")
    checks = checks_of(bundle, board, settings)
    assert {name for name, check in checks.items() if not check.passed} == {"bundle", "plugin"}
    assert "sha256 is not the recorded one" in checks["plugin"].got


def test_an_own_library_must_have_a_recorded_hash(bundle, board, settings, prebuilt, tmp_path):
    copy = tmp_path / "mine.so"
    copy.write_bytes(prebuilt().read_bytes())
    own = replace(settings, plugin=copy)
    assert failed(bundle, board, own) == set()
    copy.write_bytes(b"another")
    check = checks_of(bundle, board, own)["plugin"]
    assert not check.passed
    assert "is in no record" in check.got
    copy.unlink()
    assert "no such file" in checks_of(bundle, board, own)["plugin"].got


def test_a_bundle_without_plugin_sources_says_so(bundle, board, settings):
    manifest = read_manifest(bundle)
    section = {**(manifest.device or {}), "parts": ["core"], "missing": ["tensorrt"]}
    write_manifest(bundle, replace(manifest, device=section))
    check = checks_of(bundle, board, settings)["plugin"]
    assert not check.passed
    assert "carries no sources of tensorrt" in check.got
    assert recorded(settings, section) == []


def test_a_bundle_for_a_cpu_says_so(bundle, board, settings):
    write_manifest(bundle, replace(read_manifest(bundle), device=None))
    checks = checks_of(bundle, board, settings)
    assert not checks["graph"].passed
    assert "--target jetson" in checks["graph"].remedy


@pytest.mark.parametrize(("prompt", "tokens", "passes"), [(12, 18, True), (11, 18, False), (12, 17, False)])
def test_profiles_hold_the_recorded_vectors(bundle, board, settings, prompt, tokens, passes):
    short = replace(settings, max_prompt=prompt, max_tokens=tokens)
    assert checks_of(bundle, board, short)["profiles"].passed is passes


def test_profiles_end_with_the_models_positions(bundle, board, settings):
    assert checks_of(bundle, board, replace(settings, max_tokens=4096))["profiles"].passed
    assert not checks_of(bundle, board, replace(settings, max_tokens=4097))["profiles"].passed


def test_impossible_profiles_are_a_usage_error(settings):
    with pytest.raises(UsageError, match="--max-prompt 2048"):
        replace(settings, max_prompt=2048)


def test_memory_is_the_sum_that_is_shown(bundle, board, settings):
    manifest: Manifest = read_manifest(bundle)
    spec = ModelSpec.from_json(json.dumps(manifest.model["spec"]))
    terms = memory_terms(manifest, spec, settings)
    # 3 heads in all, 8 wide, 2048 tokens, key and value, fp32, past and present; 512 rows of 40 logits.
    assert terms == {
        "weights x 2": 200_000_000,
        "kv cache x 2": 2 * 2 * 3 * 8 * 2048 * 4,
        "logits": 512 * 40 * 4,
        "workspace": 512_000_000,
    }
    total = sum(terms.values())
    assert failed(bundle, replace(board, free_memory_bytes=total), settings) == set()
    assert failed(bundle, replace(board, free_memory_bytes=total - 1), settings) == {"memory"}
    assert all(name in checks_of(bundle, board, settings)["memory"].needed for name in terms)
