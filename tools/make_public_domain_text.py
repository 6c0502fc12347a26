"""Make the public-domain half of the shipped calibration text from two Debian packages.

    apt-get install dict-jargon dict-devil
    python tools/make_public_domain_text.py --out jpq_export/data/public_domain.jsonl

The Jargon File (its editors put it in the public domain) and The Devil's Dictionary (Ambrose Bierce, 1911).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from pathlib import Path

FOLDER = Path("/usr/share/dictd")
BYTES_OF_EACH = 220_000
PIECE = 2_000  # characters of a document, about
HEADERS = 3  # leading pieces that describe the database itself


def pieces(name: str) -> list[str]:
    """Entries joined to documents of about PIECE characters, hard line breaks undone."""
    raw = gzip.decompress((FOLDER / f"{name}.dict.dz").read_bytes()).decode("utf-8", "ignore")
    entries = [entry.strip() for entry in re.sub(r"\n[ \t]+", " ", raw).split("\n") if len(entry.strip()) > 80]
    out, size = [[]], 0
    for entry in entries:
        if size > PIECE:
            out.append([])
            size = 0
        out[-1].append(entry)
        size += len(entry)
    return ["\n\n".join(part) for part in out][HEADERS:]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    lines = []
    for name in ("jargon", "devil"):
        documents, total = pieces(name), 0
        random.Random(0).shuffle(documents)
        for document in documents:
            if total > BYTES_OF_EACH:
                break
            total += len(document)
            lines.append(json.dumps({"text": document}, ensure_ascii=False))
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
