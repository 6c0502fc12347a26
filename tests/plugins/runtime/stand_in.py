"""A bundle with the engine of a stand-in for TensorRT and CUDA (fake_*.cpp), and what that computes.

NOT a GPU: the stand-in records the calls, keeps the tokens it finds in the KV cache and runs a stream only when it is
synchronised; the address sanitizer watches the sizes of its buffers.
"""

import json
import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from jpq_export.engine.builder import DECODE, PREFILL, input_shape, profile_shapes
from jpq_export.engine.plugin import LIBRARY
from jpq_export.engine.report import DeviceReport, Speed, write_report
from jpq_export.engine.settings import Settings
from jpq_export.engine.vectors import DeviceParity
from jpq_export.format.bundle import Manifest, hash_file, write_manifest
from jpq_export.runtime.sampling import choose

BAD_ARGUMENT, BAD_BUNDLE, UNSUPPORTED, BACKEND, NO_MEMORY = 1, 2, 3, 4, 5
TENSORRT = {"BACKEND": "1"}
MAX_PROMPT, MAX_TOKENS, VOCAB = 5, 24, 40
FLOAT, INT64 = 0, 8  # nvinfer1::DataType
CACHES = tuple(f"{i}.{part}" for i in (0, 2) for part in ("key", "value"))
INPUTS = ("input_ids", "attention_mask", "position_ids", *(f"past.{name}" for name in CACHES), "logits_at")
PROMPT = (3, 17, 4)
CLASSES = {  # class of ours -> interface
    "StubRuntime": "VRuntime",
    "StubCudaEngine": "VCudaEngine",
    "StubExecutionContext": "VExecutionContext",
    "StubPluginRegistry": "IPluginRegistry",
}


def stub_classes(headers: str) -> str:
    """TensorRT's interfaces as classes whose every method ends the test, of whatever version NVIDIA's headers are.

    `headers`: NvInferRuntime.h after the preprocessor.
    """
    headers = re.sub(r"\[\[.*?\]\]|__attribute__\s*\(\(.*?\)\)", "", headers)
    parts = ["namespace nvinfer1 {"]
    for name, interface in CLASSES.items():
        body = re.search(rf"class {interface}\b[^;{{]*\{{(.*?)\n\}};", headers, re.S)
        assert body, interface
        methods = re.findall(r"virtual\s([^;{}]*?)=\s*0\s*;", body[1])
        assert len(methods) > 10, interface
        place = interface if interface.startswith("I") else f"apiv::{interface}"
        parts.append(f"class {name} : public {place} {{\n public:")
        for method in methods:
            called = re.search(r"(\w+)\s*\(", method)
            assert called, method
            parts.append(f'  {" ".join(method.split())} override {{ never("unexpected call of {called[1]}"); }}')
        parts.append("};")
    return "\n".join([*parts, "}", ""])


def write_bundle(folder, spec, helpers):
    """`helpers`: the conftest of tests/runtime, for a tokenizer."""
    folder.mkdir()
    helpers.write_tokenizer(folder, helpers.WORDS)
    words = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="</s>"))  # of a kind the library knows
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = {"name": "tiny", "spec": json.loads(spec.to_json())}
    target: dict[str, object] = {"name": "jetson"}
    manifest = Manifest(model=model, target=target, method="jpq", bits_per_weight=4.0, weight_bytes=1, original_bytes=4)
    write_manifest(folder, manifest)
    write_device(folder, engine_text(spec))
    return folder


def engine_text(spec, **changes):
    """The stand-in's engine, with the profiles `jpq-export build` gives TensorRT."""
    settings = Settings(Path("bundle"), Path("engine"), max_prompt=MAX_PROMPT, max_tokens=MAX_TOKENS)
    lines = []
    for name in INPUTS:
        shape = list(input_shape(name, spec, seq=-1, past=0))
        shape = {1: [-1], 2: [1, -1]}.get(len(shape)) or [1, shape[1], -1, shape[3]]
        kind = INT64 if len(shape) < 4 else FLOAT
        lines.append(f"in {name} {kind} {len(shape)} {' '.join(map(str, shape))}")
        for profile in (DECODE, PREFILL):
            low, _, high = profile_shapes(name, spec, settings, profile=profile)
            lines.append(f"range {profile} {name} {len(low)} {' '.join(map(str, (*low, *high)))}")
        if name.startswith("past."):
            lines.append(lines[-3].replace("in past.", "out present."))
    lines.append(f"out logits {FLOAT} 3 1 -1 {VOCAB}")
    text = "\n".join(lines) + "\n"
    for old, new in changes.items():
        assert re.search(old, text)
        text = re.sub(old, new, text)
    return text


def write_device(bundle, engine, *, library=b"a plugin", origin="compiled here", tensorrt="10.3.0.30", sm=87):
    """What `jpq-export build` leaves in device/, by its own report; the engine is the stand-in's."""
    home = bundle / "device"
    home.mkdir(exist_ok=True)
    (home / "model.engine").write_text(engine)
    (home / LIBRARY).write_bytes(library)
    entry, plugin = hash_file(home / "model.engine"), hash_file(home / LIBRARY)
    report = DeviceReport(
        device={"board": "described", "sm": sm, "machine": "any"},
        versions={"tensorrt": tensorrt},
        settings={},
        checks=(),
        plugin={"file": LIBRARY, "origin": origin, "sha256": plugin.sha256, "sms": [sm]},
        engine={"file": "model.engine", "sha256": entry.sha256, "bytes": entry.bytes},
        seconds={},
        parity=DeviceParity("pytorch", (), 1, 1, tie=False),
        speed=Speed(1, 1.0, 1, 1.0),
    )
    write_report(report, home)


def tokens_of(done):
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [int(line) for line in done.stdout.split()]


def refused(done, *words):
    """Code of a refusal of one line that holds all words."""
    assert done.returncode == 3, done.stderr.decode()[-3000:]
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("TensorRT 10")]
    assert len(lines) == 1, lines
    code, text = lines[0].split(" ", 1)
    for word in words:
        assert word in text
    return int(code)


def logits_of(tokens):
    """The stand-in's rule."""
    state = 7
    for token in tokens:
        state = (state * 31 + token * 17 + 5) % 1009
    return (state * np.arange(1, VOCAB + 1) * 13 % 101 / 8).astype(np.float32)


def expected(prompt, count, **sampling):
    tokens, rng = list(prompt), np.random.default_rng(sampling.pop("seed", 0))
    for _ in range(count):
        tokens.append(choose(logits_of(tokens), rng, **sampling))
    return tokens[len(prompt) :]
