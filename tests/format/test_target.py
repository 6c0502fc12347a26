"""Targets: the shipped files are complete and sourced, a user's own file works, each mistake gets one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from jpq_export.errors import TargetError
from jpq_export.format.target import KEYS, Target, list_targets, load_target, targets_folder
from jpq_export.numerics.scheme import Scheme

NAMES = (
    *("agx-orin-64gb", "agx-thor", "cpu", "cpu-x86", "h100", "jetson", "l4"),
    *("orin-nano-8gb", "orin-nx-16gb", "rtx-4090", "rtx-5090"),
)
OWN = """
title = "Mine"
kind = "jetson"
sm = 87
memory_gb = 4
bandwidth_gb_s = 50.5
fp16_tflops = 5
op_overhead_us = 6
default_bits = 3.5
graph = "custom_op"
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def without(key: str) -> str:
    return "\n".join(line for line in OWN.splitlines() if not line.startswith(f"{key} "))


def test_the_list_is_sorted_and_complete() -> None:
    assert tuple(target.name for target in list_targets()) == NAMES


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.name)
def test_every_number_of_a_shipped_target_has_a_source(target: Target) -> None:
    numbers = {"memory_bytes", "bandwidth_gb_s", "fp16_tflops", "op_overhead_us", "default_bits"}
    numbers |= {name for name in ("sm", "tensorrt") if getattr(target, name) is not None}
    assert numbers <= set(target.sources)


def test_facts_that_other_parts_rely_on() -> None:
    jetson, nano, thor, cpu = map(load_target, ("jetson", "orin-nano-8gb", "agx-thor", "cpu"))
    assert (jetson.sm, jetson.tensorrt, jetson.jetpack, jetson.graph) == (87, "10.3", "6.2", "custom_op")
    assert (jetson.default_bits, jetson.memory_bytes) == (4.0, 8 * 2**30)
    assert (jetson.bandwidth_gb_s, jetson.fp16_tflops) == (nano.bandwidth_gb_s, nano.fp16_tflops) == (102.0, 17.0)
    assert (thor.sm, thor.tensorrt) == (110, "10.13")
    assert (cpu.kind, cpu.graph, cpu.sm, cpu.tensorrt) == ("cpu", "custom_op", None, None)


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, OWN))
    assert target.name == "mine"
    assert target.memory_bytes == 4 * 2**30
    assert (target.bandwidth_gb_s, target.sm, target.sources) == (50.5, 87, {})
    assert isinstance(target.op_overhead_us, float)


def test_inheriting_replaces_numbers_and_their_sources(tmp_path: Path) -> None:
    text = 'inherit = "jetson"\nbandwidth_gb_s = 68\nmemory_gb = 4\n[sources]\nmemory_gb = "my label"\n'
    target, parent = load_target(write(tmp_path, text)), load_target("jetson")
    assert (target.bandwidth_gb_s, target.memory_bytes) == (68.0, 4 * 2**30)
    assert target.fp16_tflops == parent.fp16_tflops
    assert target.sources["memory_bytes"] == "my label"
    assert "bandwidth_gb_s" not in target.sources  # the parent's source is not this number's
    assert target.sources["fp16_tflops"] == parent.sources["fp16_tflops"]


def test_inherit_is_relative_to_the_file(tmp_path: Path) -> None:
    write(tmp_path, OWN, "base.toml")
    assert load_target(write(tmp_path, 'inherit = "base.toml"\nfp16_tflops = 9\n')).fp16_tflops == 9.0


def test_the_installed_package_finds_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jpq_export.format.target as module

    package = tmp_path / "jpq_export"
    (package / "_targets").mkdir(parents=True)
    write(package / "_targets", OWN, "only.toml")
    assert targets_folder() != package / "_targets"
    monkeypatch.setattr(module, "__file__", str(package / "format" / "target.py"))
    assert [target.name for target in list_targets()] == ["only"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_gb = ", "not valid TOML"),
        (OWN + "bandwith_gb_s = 3", "'bandwith_gb_s'; did you mean bandwidth_gb_s?"),
        (OWN + "zzz = 1", "unknown key 'zzz'; expected keys: inherit, title"),
        (OWN + "[sources]\nwrong = 'x'", "sources: unknown key 'wrong'"),
        (OWN + "[sources]\nsm = 1", "sources: got {'sm': 1}, expected a table"),
        (OWN.replace("memory_gb = 4", "memory_gb = -4"), "memory_gb: got -4, expected a number above 0"),
        (OWN.replace("memory_gb = 4", "memory_gb = true"), "memory_gb: got True, expected a number"),
        (OWN.replace("memory_gb = 4", "memory_gb = '4'"), "memory_gb: got '4', expected a number"),
        (OWN.replace("= 50.5", "= nan"), "bandwidth_gb_s: got nan"),
        (OWN.replace("= 50.5", "= inf"), "bandwidth_gb_s: got inf"),
        (OWN.replace("sm = 87", "sm = 8.7"), "sm: got 8.7, expected an integer above 0"),
        (OWN.replace("3.5", "17"), "default_bits: got 17, expected a number above 1, at most 16"),
        (OWN.replace("jetson", "toaster"), "kind: got 'toaster', expected one of jetson, rtx"),
        (OWN.replace("custom_op", "gguf"), "graph: got 'gguf', expected one of custom_op, qdq"),
        (OWN.replace("Mine", ""), "title: got '', expected a text that is not empty"),
        (OWN + "engine = 'onnx'", "engine: got 'onnx', expected one of tensorrt-rtx"),
        (OWN + "stored_bits = [3]", "stored_bits: got [3], expected a list of widths out of 4, 8, such as [4, 8]"),
        (OWN + "stored_bits = 4", "stored_bits: got 4, expected a list of widths"),
        (OWN + "engine = 'tensorrt-rtx'", "engine: TensorRT-RTX builds for sm 75, 80, 86, 89, 120, 121 only, got 87"),
        (OWN.replace("87", "89") + "engine = 'tensorrt-rtx'", "stored_bits: missing"),
        (OWN + "tensorrt = 10.3", "tensorrt: got 10.3, expected a version in quotes"),
        (OWN + "tensorrt = '10.x'", "tensorrt: got '10.x'"),
        ("inherit = 3\n" + OWN, "inherit: got 3"),
        ("inherit = 'jetsn'\n" + OWN, "inherit: unknown target 'jetsn'; did you mean jetson?"),
        ("inherit = 'gone.toml'\n" + OWN, "gone.toml is not a file"),
        ("inherit = 'mine.toml'\n" + OWN, "circle (mine.toml -> mine.toml)"),
        *((without(key), f"{key}: missing") for key, rule in KEYS.items() if rule.required or key == "sm"),
    ],
)
def test_a_malformed_file_gets_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TargetError) as caught:
        load_target(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_a_longer_circle(tmp_path: Path) -> None:
    write(tmp_path, "inherit = 'b.toml'", "a.toml")
    write(tmp_path, "inherit = 'a.toml'", "b.toml")
    with pytest.raises(TargetError, match=r"circle \(a\.toml -> b\.toml -> a\.toml\)"):
        load_target(tmp_path / "a.toml")


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"title = \xff\xfe")
    with pytest.raises(TargetError, match="not UTF-8 text"):
        load_target(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("jetsn", "did you mean jetson?"),
        ("RTX-4090", "did you mean rtx-4090?"),
        ("orin-nano", "did you mean orin-nano-8gb?"),
        ("toaster9000x", "unknown target 'toaster9000x'; targets: agx-orin-64gb"),
        ("", "unknown target ''"),
        ("nowhere/mine.toml", "is not a file"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_and_lists_all(name: str, said: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_target(name)
    assert said in str(caught.value)
    assert all(known in str(caught.value) for known in NAMES)


@pytest.mark.parametrize(("bits", "stored"), [(2, 4), (3, 4), (4, 4), (5, 8), (6, 8), (8, 8)])
def test_desktop_gpus_store_the_next_wider_signed_code(bits: int, stored: int) -> None:
    for name in ("rtx-4090", "rtx-5090", "l4"):
        target = load_target(name)
        for scheme in (Scheme(bits, 64), Scheme(bits, 64, symmetric=False)):
            fitted = target.fit(scheme)
            assert fitted.bits == bits
            assert target.stored_bytes(fitted, 32, 128) == 32 * (128 * stored // 8 + 2 * 2)
            assert fitted.integer_zero is (bits in (4, 8))  # only there a half needs one bit more


def test_what_no_signed_code_holds_is_told(tmp_path: Path) -> None:
    rtx, jetson = load_target("rtx-4090"), load_target("jetson")
    half, whole = Scheme(8, 64), Scheme(8, 64, integer_zero=True)
    assert (rtx.holds(half), rtx.holds(whole)) == (False, True)
    assert jetson.holds(half)
    assert rtx.stored_bytes(Scheme(4, 64), 32, 128) == rtx.stored_bytes(whole, 32, 128)  # 4 bits about a half: INT8


def test_other_targets_store_schemes_as_they_are() -> None:
    jetson = load_target("jetson")
    for scheme in (Scheme(3, 64), Scheme(4, 32, symmetric=False)):
        assert jetson.fit(scheme) is scheme
        assert jetson.stored_bytes(scheme, 32, 128) == scheme.weight_bytes(32, 128)
