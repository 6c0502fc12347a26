"""How time and memory of an export grow with the model: whole runs of models with random weights, stage by stage.

    python tools/growth.py --sizes 13,50,135,290 --effort quick --out docs/growth

Shapes are SmolLM2's (heads of 64, three query heads a key/value head, MLPs 8/3 as wide, 30 layers where that fits, its
vocabulary and tokenizer), weights are random: time and memory do not depend on their values, except that the search may
choose another plan. Every size is a process of its own; what is in `growth.json` already is not run again. The page has
a line for each stage on logarithmic axes, and the exponent by which it grows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from markupsafe import Markup

from jpq_export.bench.report import frame
from jpq_export.parity.svg import Axis, element, svg, text
from jpq_export.revision import processor, provenance
from jpq_export.runtime import native
from jpq_export.workspace import write_atomic

VOCABULARY, LAYERS, HEAD = 49152, 30, 64
WIDTH, HEIGHT, LEFT, RIGHT = 720, 360, 60, 200
COLOURS = ("#2f6fbd", "#c4572e", "#3d8f5f", "#8a5bb5", "#b08a1e", "#c0476f", "#4b8f9e", "#777777")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-like model."""

    layers: int
    hidden: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.hidden // HEAD

    @property
    def ffn(self) -> int:
        """MLP channels."""
        return self.hidden * 8 // 3

    @property
    def parameters(self) -> int:
        """All of them, the tied table once."""
        attention = self.hidden * self.hidden * (2 + 2 / 3)
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return round(self.layers * layer + VOCABULARY * self.hidden + self.hidden)


def shape_for(millions: float) -> Shape:
    """The shape next to so many parameters, SmolLM2's proportion of depth to width (30 layers at 576)."""
    shapes = [Shape(round(LAYERS * hidden / 576), hidden) for hidden in range(192, 4096, 192)]
    return min(shapes, key=lambda shape: abs(shape.parameters - millions * 1e6))


def save_model(shape: Shape, folder: Path) -> None:
    """Random weights, and the default model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jpq_export.compress.load import load_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 3,
        head_dim=HEAD,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    default = load_model(None)
    (folder / "tokenizer.json").write_bytes(default.tokenizer_json)
    (folder / "tokenizer_config.json").write_bytes(default.tokenizer_config)


def measure(shape: Shape, effort: str, bits: float) -> dict[str, Any]:
    """A whole export of one shape in a process of its own; what its manifest says of every stage."""
    with TemporaryDirectory(prefix="jpq-growth-") as name:
        folder = Path(name)
        save_model(shape, folder / "model")
        command = [sys.executable, "-m", "jpq_export", str(folder / "model"), "--target", "cpu", "--effort", effort]
        command += ["--bits", f"{bits:g}", "--out", str(folder / "bundle")]
        start = time.perf_counter()
        done = subprocess.run(command, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"growth: {' '.join(command)} ended with code {done.returncode}")
        stages = json.loads((folder / "bundle" / "manifest.json").read_text(encoding="utf-8"))["stages"]
    return {
        **provenance(),
        "layers": shape.layers,
        "hidden": shape.hidden,
        "parameters": shape.parameters,
        "effort": effort,
        "bits": bits,
        "seconds": round(seconds, 1),
        "stages": stages,
    }


def by_stage(runs: list[dict[str, Any]], field: str) -> dict[str, list[tuple[int, float]]]:
    """Stage -> (parameters, seconds or bytes) of every run; stages of one name are added up, of bytes the highest."""
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run["parameters"]):
        found: dict[str, list[float]] = defaultdict(list)
        for stage in run["stages"]:
            found[stage["name"]].append(stage[field])
        for name, values in found.items():
            lines[name].append((run["parameters"], sum(values) if field == "seconds" else max(values)))
    return dict(lines)


def exponent(points: list[tuple[int, float]]) -> float:
    """The exponent b of the least-squares fit of value = a * parameters^b."""
    x, y = np.log([[p, v] for p, v in points if v > 0]).T
    return float(np.polyfit(x, y, 1)[0])


def picture(lines: dict[str, list[tuple[int, float]]], unit: str, scale: float) -> Markup:
    """One line a stage, both axes logarithmic."""
    sizes = [p / 1e6 for points in lines.values() for p, _ in points]
    values = [v * scale for points in lines.values() for _, v in points if v > 0]
    x = Axis(min(sizes) * 0.9, max(sizes) * 1.1, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(min(values) * 0.8, max(values) * 1.25, HEIGHT - 40, 14, log=True)
    parts = [text(x.at(p), HEIGHT - 20, f"{p:.0f}M", text_anchor="middle") for p in sorted(set(sizes))]
    for v in y.ticks():
        parts.append(text(LEFT - 8, y.at(v) + 4, f"{v:g}", text_anchor="end"))
        parts.append(element("path", d=f"M{LEFT} {y.at(v):.1f}H{WIDTH - RIGHT}", stroke="#8884"))
    ends: list[float] = []
    for (name, points), colour in zip(
        sorted(lines.items(), key=lambda pair: -pair[1][-1][1]), COLOURS * 9, strict=False
    ):
        at = [(x.at(p / 1e6), y.at(v * scale)) for p, v in points if v > 0]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in at)
        parts.append(element("path", d=path, stroke=colour, fill="none", stroke_width=2))
        parts += [element("circle", cx=a, cy=b, r=3.5, fill=colour) for a, b in at]
        height = at[-1][1] + 4
        while any(abs(height - other) < 16 for other in ends):
            height += 16
        ends.append(height)
        parts.append(text(WIDTH - RIGHT + 12, height, f"{name}, ^{exponent(points):.2f}", style=f"fill: {colour}"))
    label = f"{unit} of every stage against the number of parameters"
    return svg(WIDTH, max([HEIGHT, *ends]) + 8, *parts, label=label)


def page(runs: list[dict[str, Any]]) -> str:
    """Time, memory, and all numbers."""
    runs = sorted(runs, key=lambda run: run["parameters"])
    seconds, memory = by_stage(runs, "seconds"), by_stage(runs, "peak_rss_bytes")
    whole = {"whole run": [(run["parameters"], run["seconds"]) for run in runs]}
    about = f"--effort {runs[0]['effort']}, {runs[0]['bits']:g} bits, {runs[0]['machine']}, commit {runs[0]['commit']}"
    sections = [
        element("p", f"{about}; random weights of SmolLM2's proportions. ^b: grows with parameters to the power b."),
        element("h2", "Seconds"),
        picture(whole | seconds, "Seconds", 1),
        element("h2", "Peak memory, GB"),
        picture(memory, "Peak memory, GB", 1e-9),
    ]
    return frame(processor(), "How an export grows with the model", sections)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="13,50,135,290", help="millions of parameters, by commas")
    parser.add_argument("--effort", default="quick", choices=("quick", "standard", "max"))
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--out", type=Path, required=True, help="folder of growth.json and growth.html")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "growth.json"
    runs = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    native.cpu_library()  # compiled once; no run is to be the one that waits for it
    for millions in map(float, asked.sizes.split(",")):
        shape = shape_for(millions)
        key = (shape.parameters, asked.effort, asked.bits)
        if key not in [(run["parameters"], run["effort"], run["bits"]) for run in runs]:
            runs.append(measure(shape, asked.effort, asked.bits))
            write_atomic(file, json.dumps(runs, indent=1) + "\n")
        done = next(run for run in runs if (run["parameters"], run["effort"], run["bits"]) == key)
        peak = max(stage["peak_rss_bytes"] for stage in done["stages"])
        sys.stdout.write(f"{done['parameters'] / 1e6:.0f}M: {done['seconds']:.0f} s, {peak / 1e9:.2f} GB\n")
    same = [run for run in runs if (run["effort"], run["bits"]) == (asked.effort, asked.bits)]
    write_atomic(asked.out / "growth.html", page(same))


if __name__ == "__main__":
    main()
