"""What transformers and torch.onnx print of their own accord, kept off the console."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.export")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers and no warnings about our inputs' classes: errors are what we say ourselves."""
    from transformers.utils import logging as told

    before, bars = told.get_verbosity(), told.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    told.set_verbosity_error()
    told.disable_progress_bar()
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.set_verbosity(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            told.enable_progress_bar()
