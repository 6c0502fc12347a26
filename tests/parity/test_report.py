"""The report page: complete, self-contained, escaped, and honest about what is missing."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from jpq_export.errors import BundleError
from jpq_export.format.bundle import check_hashes, read_manifest, write_manifest
from jpq_export.format.plan import Budget, Choice, FrontPoint, LayerPlan, Plan, Predicted, Removal
from jpq_export.format.target import load_target
from jpq_export.parity.check import check_parity
from jpq_export.parity.report import NAME, write_report
from jpq_export.parity.svg import Axis, decades, element

EVIL = '<script>alert("&")</script>'


CONTRAST = {
    "chosen_by": "bytes",
    "bytes": 4000,
    "latency_ms": 0.8,
    "predicted_kl": 1e-4,
    "attention_removed": 0,
    "mlp_removed": 1,
    "heads_kept": 0.75,
    "channels_kept": 0.5,
    "mean_bits": 3.25,
}


def plan(model, kind: str = "size") -> Plan:
    spec = model.spec
    choices = [
        Choice(name, w.scheme.bits, 16, True, *w.shape, w.nbytes, 0.001 * i, f"reason {i} {EVIL}")
        for i, (name, w) in enumerate(model.quantized.items())
    ]
    layers = [LayerPlan(i, tuple(range(x.kv_heads)), 2, x.ffn, 96) for i, x in enumerate(spec.layers)]
    front = [FrontPoint(1000 * i, 0.1 * i, 0.2 * i, 10.0**-i) for i in range(1, 8)]
    return Plan(
        model_name="tiny",
        model_sha256="0" * 64,
        target="jetson",
        method="jpq",
        budget=Budget(kind, 4.0, 4100, 0.85 if kind == "latency" else None),
        layers=tuple(layers),
        choices=tuple(choices),
        removed=(Removal("layers.1.attn", 0.01, "too dear"),),
        predicted=Predicted(1e-4, 4000, 0.8, 0.001),
        front=tuple(front),
        search={"contrast": [CONTRAST, CONTRAST | {"chosen_by": "microseconds", "attention_removed": 1}]},
    )


@pytest.fixture
def full(bundle: Path, models, prompts) -> Path:
    """A bundle with every optional part."""
    from dataclasses import asdict

    (bundle / "plan.json").write_text(plan(models["llama"]).to_json())
    parity = check_parity(models["llama"], bundle / "model.onnx", prompts=prompts, steps=8)
    (bundle / "parity.json").write_text(parity.to_json())
    manifest = replace(
        read_manifest(bundle),
        target=asdict(load_target("jetson")),
        quality={
            "kl_mean": 0.1,
            "kl_p99": 1.0,
            "top1_agreement": 0.9,
            "perplexity": 22.0,
            "teacher_perplexity": 20.0,
            "tokens": 2048,
        },
        staircase=(
            {"stage": "round", "heldout_kl": 1.2, "applied": True},
            {"stage": "tune", "heldout_kl": 1.3, "applied": False},
        ),
        stages=({"name": "load", "seconds": 1.5, "peak_rss_bytes": 10**9, "resumed": False},),
        versions={"onnxruntime": "1"},
    )
    write_manifest(bundle, manifest.with_contents(bundle))
    return bundle


class Checker(HTMLParser):
    """Collects text, and fails on tags that are not closed in order."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(folder: Path) -> Checker:
    checker = Checker()
    checker.feed((folder / NAME).read_text())
    assert checker.open == []
    return checker


def test_full_page(full: Path):
    write_report(full)
    page = read_page(full)
    for expected in (
        "parity passed",
        "8 of 8 greedy tokens",
        "from 20.00: +10.0%",
        "layers.1.attn",
        "too dear",
        "Bytes or time",
        "mean bits left",
        "chosen: 4.00 kB",
        "1.3, not kept",
        "1.5 s",
        f"{load_target('jetson').bandwidth_gb_s:g} GB/s",
        "model.onnx.data",
    ):
        assert expected in page.text, expected
    assert 'class="missing"' not in (full / NAME).read_text()


def test_page_is_self_contained_and_escaped(full: Path):
    write_report(full)
    page = (full / NAME).read_text()
    assert not {"script", "link", "img", "iframe"} & read_page(full).seen
    assert not re.search(r"(src|href)\s*=|@import|url\((?!#)|https?://", page)
    assert EVIL not in page
    assert EVIL in read_page(full).text


def test_a_page_without_anything_optional_says_so(bundle: Path):
    write_report(bundle)
    text = read_page(bundle).text
    assert "parity not checked" in text
    for expected in ("No parity.json", "No plan.json", "No front", "Not recorded in this run", "not measured"):
        assert expected in text


def test_a_failure_is_in_the_headline(full: Path):
    raw = json.loads((full / "parity.json").read_text())
    raw["passed"] = raw["runtimes"][0]["passed"] = False
    raw["runtimes"][0]["logits"]["rel_rms"] = None  # not finite
    raw["runtimes"][0]["layers"][2] |= {"rel_rms": None, "passed": False}
    raw["runtimes"][0]["divergence"] = {
        "sublayer": "layers.0.mlp",
        "place": "layers.0.mlp.up",
        "node": "LowBitMatMul 'layers.0.mlp.up'",
        "rel_rms": 0.5,
        "bound": 1e-5,
    }
    (full / "parity.json").write_text(json.dumps(raw))
    write_report(full)
    page = read_page(full)
    assert "parity failed" in page.text
    assert (
        "First wrong value: layers.0.mlp.up (sub-layer layers.0.mlp, node LowBitMatMul 'layers.0.mlp.up')" in page.text
    )
    assert "first wrong: layers.0.mlp.up" in page.text


def test_a_latency_budget_shows_the_latency_front(full: Path, models):
    (full / "plan.json").write_text(plan(models["llama"], "latency").to_json())
    write_report(full)
    text = read_page(full).text
    assert "budget 0.85 ms" in text
    assert "predicted time of one token, milliseconds" in text


def test_report_is_reproducible_and_keeps_the_hashes_right(full: Path):
    write_report(full)
    first = (full / NAME).read_bytes()
    assert check_hashes(full, read_manifest(full)) == []
    write_report(full)
    assert (full / NAME).read_bytes() == first


@pytest.mark.parametrize("name", ["plan.json", "parity.json"])
def test_broken_json_is_one_line(full: Path, name: str):
    (full / name).write_text("{")
    with pytest.raises(BundleError, match=f"{name}: not readable JSON"):
        write_report(full)


def test_pictures_are_well_formed_xml(full: Path):
    write_report(full)
    pictures = re.findall(r"<svg.*?</svg>", (full / NAME).read_text(), re.DOTALL)
    assert len(pictures) > 5
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_element_escapes_content_and_attributes():
    assert element("text", EVIL, class_='a"b', x=1.04, y=None) == (
        '<text class="a&#34;b" x="1">&lt;script&gt;alert(&#34;&amp;&#34;)&lt;/script&gt;</text>'
    )


def test_axis():
    axis = Axis(1e-6, 1e-2, 100, 0, log=True)
    assert [axis.at(v) for v in (1e-6, 1e-4, 1e-2, 1.0, 0.0)] == pytest.approx([100, 50, 0, 0, 100])
    assert axis.ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert Axis(3, 21, 0, 1).ticks(5) == [5, 10, 15, 20]
    assert decades([3e-5, 0.0, 2e-3]) == pytest.approx((1e-5, 1e-2))
    assert decades([]) == (1e-9, 1.0)
