"""`jpq-export bench`: the measurement of a decoder or of a sentence encoder, shown as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jpq_export.errors import UsageError
from jpq_export.format.bundle import read_manifest
from jpq_export.format.encoder_spec import KIND
from jpq_export.progress import Stages

DECODERS = ("widths", "prefill", "decode", "gguf")
ENCODERS = ("batch", "pairs")


def measure(bundle: Path, *, threads: tuple[int, ...], **options: Any) -> tuple[str, str]:
    """Print the table of each number of `threads`; the same as JSON and as a page. Errors: see `bench`."""
    manifest = read_manifest(bundle)
    if manifest.fallback:
        raise UsageError(
            f"{bundle}: {manifest.fallback['architecture']} went through torch.onnx.export; there are no other graphs "
            "of it to compare with"
        )
    encoder = manifest.kind == KIND
    for name in ("widths", "gguf") if encoder else ("pairs",):
        if options[name]:
            kinds = ("a language model", "a sentence encoder")
            raise UsageError(f"--{name}: for {kinds[not encoder]}, {bundle} is {kinds[encoder]}; leave it out")
    for name in DECODERS if encoder else ENCODERS:
        options.pop(name)
    return _encoder(bundle, threads, options) if encoder else _decoder(bundle, threads, options)


def _decoder(bundle: Path, threads: tuple[int, ...], options: dict[str, Any]) -> tuple[str, str]:
    from jpq_export.bench.report import page, show_bench
    from jpq_export.bench.rounds import Settings, bench, to_json

    results = [bench(bundle, Settings(threads=count, **options), Stages()) for count in threads]
    for result in results:
        show_bench(result)
    return to_json(results), page(results, bundle.name)


def _encoder(bundle: Path, threads: tuple[int, ...], options: dict[str, Any]) -> tuple[str, str]:
    from jpq_export.bench.encoder_report import encoder_page, show_encoder_bench
    from jpq_export.bench.encoders import EncoderSettings, bench_encoder, to_json

    results = [bench_encoder(bundle, EncoderSettings(threads=count, **options), Stages()) for count in threads]
    for result in results:
        show_encoder_bench(result)
    return to_json(results), encoder_page(results, bundle.name)
