"""Make the generated half of the calibration text: documents sampled from the default model, one JSON line each.

    python tools/make_calibration_text.py --out jpq_export/data/calibration.jsonl

The same seed gives the same text on the same machine and torch version; elsewhere sampling may take another path, so
the file is kept in the repository. About 300 tokens a second on one core with AMX.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer

from jpq_export.compress.decoder import Decoder, KVCache

BATCH = 64
END_OF_TEXT = 0  # SmolLM2 separates documents with <|endoftext|>
STOP = (END_OF_TEXT, 1, 2)  # and closes chat turns with <|im_end|>

# Openings for many kinds of prose; {} is a topic. Without them a small model mostly starts broken code and tables.
OPENINGS = (
    "{}\n\nIntroduction\n",
    "The history of {} ",
    "{} is ",
    "{} was ",
    "What is {}?\n\n",
    "How to learn about {}: a step-by-step guide\n\n1.",
    "In recent years, {} has ",
    "NEWS - A new report about {} published on Monday ",
    "Once upon a time, there was a woman who cared about {}. She ",
    '"I never thought much about {}," said Thomas, ',
    "Question: Why does {} matter?\nAnswer: ",
    "Chapter 3. {}\n\nIn this chapter ",
    "I have been interested in {} since 2009. ",
    "Abstract. We study {} ",
    "Review: this book on {} ",
    "Dear Sir,\n\nI am writing about {}. ",
    "The following table of facts about {}:\n\n- ",
    "Some people think that {} ",
    "During the war, {} ",
    "Our company works with {} ",
    "# A small program for {}\n\nimport ",
    "Frequently asked questions about {}\n\nQ: ",
    "Scientists who work on {} ",
    "This week's meeting was about {}. First, ",
)
TOPICS = tuple(
    topic.strip()
    for topic in """
    railways; the moon; bread; chess; volcanoes; the French Revolution; football; dogs; insurance; photosynthesis;
    the novel; jazz; steel; river ports; vaccines; taxation; whales; bicycles; the Roman army; gardening; electricity;
    mathematics in schools; glass; the stock market; migration; wine; coral reefs; printing; castles; earthquakes;
    wool; satellites; the English language; coffee; elections; bridges; honey bees; opera; submarines; the heart;
    cotton; maps; painting; rice; robots; sleep; the Silk Road; tennis; trade unions; tea; telescopes; poverty;
    forests; newspapers; the kidney; Buddhism; lighthouses; hurricanes; banking; film; cooking; memory; horses;
    copyright; swimming; airports; the Middle Ages; salt; gravity; radio; the Baltic Sea; soil; theatre; bacteria;
    computers; housing; music for children; the Andes; nuclear power; shoes; snow; parliament; the violin; sharks;
    pottery; rail strikes; batteries; diabetes; poetry; cricket; ants; deserts; law courts; paper; the piano; ships;
    mountain villages; dinosaurs; rockets; universities; potatoes; the internet; advertising; old churches; owls;
    water supply; wind power; hospital care; fashion; geometry; friendship; gold mining; the Ottoman Empire; apples;
    travel by train; video games; fishing; democracy; rain; the human eye; libraries; wolves; street markets; tides;
    kings and queens; the periodic table; baseball; olive oil; prison reform; butterflies; clocks; family life;
    small businesses; winter sports; roads; Shakespeare; cancer research; mobile phones; the economy of Brazil;
    ancient Egypt; school lunches; knitting; light; rubber; the Supreme Court; local food; the brain; islands
    """.split(";")  # noqa: SIM905 a hundred quoted strings would read worse
)

# Left out: what looks like somebody's address or number though it is invented, crude words, Windows line ends.
UNFIT = re.compile(
    r"[\w.+-]+@[\w-]+\.\w+|https?://|www\.|\w\.(com|org|net|gov|edu|io|co)\b|\(?\d{3}\)?[-. ]\d{3}[-. ]\d{4}|\r"
    r"|(?i:\b(fuck|rape|porn|sexting|suicide))"
)
SHORTEST = 200  # characters


def prompts(count: int, seed: int) -> list[str]:
    """`count` different openings."""
    pairs = [(opening, topic) for opening in OPENINGS for topic in TOPICS]
    chosen = random.Random(seed).sample(pairs, count)
    return [opening.format(topic if opening[0] != "{" else topic[0].upper() + topic[1:]) for opening, topic in chosen]


@torch.no_grad()
def sample(model: Decoder, starts: list[list[int]], *, length: int, temperature: float, seed: int) -> list[list[int]]:
    """Continue a left-padded batch to `length` tokens; padding is cut off again."""
    width = max(map(len, starts))
    ids = torch.tensor([[END_OF_TEXT] * (width - len(s)) + s for s in starts])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts])
    generator, cache, rows, new = torch.Generator().manual_seed(seed), KVCache(), ids, ids
    while rows.shape[1] < length:
        hidden = model.hidden(new, model.context(new, attention_mask=mask, cache=cache))[:, -1]
        probability = (model.logits(hidden).float() / temperature).softmax(-1)
        new = torch.multinomial(probability, 1, generator=generator)
        rows, mask = torch.cat([rows, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return [row[width - len(s) :].tolist() for row, s in zip(rows, starts, strict=True)]


def documents(
    model: Decoder, tokenizer: Tokenizer, *, count: int, length: int, temperature: float, seed: int
) -> Iterator[str]:
    """`count` documents, each cut where the model ended it."""
    starts = [
        [END_OF_TEXT, *tokenizer.encode(p.rstrip(" "), add_special_tokens=False).ids] for p in prompts(count, seed)
    ]
    for begin in range(0, count, BATCH):
        rows = sample(model, starts[begin : begin + BATCH], length=length, temperature=temperature, seed=seed + begin)
        for row in rows:
            end = next((i for i, token in enumerate(row[1:], 1) if token in STOP), len(row))
            yield tokenizer.decode(row[1:end]).replace("�", "").strip()


def main(load: Callable[[], tuple[Decoder, Tokenizer]]) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    model, tokenizer = load()
    with options.pop("out").open("w", encoding="utf-8") as file:
        for text in documents(model.bfloat16(), tokenizer, **options):
            if len(text) >= SHORTEST and not UNFIT.search(text):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def load_default() -> tuple[Decoder, Tokenizer]:
    """The default model and its tokenizer."""
    from jpq_export.compress.load import load_model

    loaded = load_model(None)
    return loaded.model, loaded.tokenizer


if __name__ == "__main__":
    main(load_default)
