"""tools/ablation.py on a tiny model: every row is another model, found rows are not made again, the table compares."""

import argparse
import sys
from typing import Any

import pytest

pytest.importorskip("torch")


@pytest.fixture
def tool(load_tool):
    return load_tool("ablation")


PLANS = ("search by prices alone, without true KL",)  # on a tiny model the plan may be the same


def test_every_row_is_another_model(tool, quick_shelf, save_tiny):
    with quick_shelf("ablation") as (folder, patch):
        patch.setattr("jpq_export.rotate._trial", lambda *_: (1.0, 0.5))
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
        facts = {"effort": "quick", "rows": None, "windows": 2, "context": 32, "bits": [4.6], "out": folder / "out"}
        asked = argparse.Namespace(model=str(save_tiny(folder / "m", "llama_tied")), text=folder / "text.txt", **facts)
        cells = {cell["row"]: cell for cell in tool.run(asked, tool.Laboratory)}
        assert set(cells) == {row.name for row in tool.ROWS}
        assert all(0 < cell["bits_per_weight"] <= 4.6 and cell["kl_mean"] > 0 for cell in cells.values())
        own = [cell["kl_mean"] for name, cell in cells.items() if name not in ("nothing removed", *PLANS)]
        assert len(set(own)) == len(own)

        def never(_: Any) -> None:
            raise AssertionError("everything is there")

        assert tool.run(asked, never) == list(cells.values())


def test_the_table_compares_with_all(tool):
    cells = [{"row": "all", "bits": 2.5, "kl_mean": 0.5}, {"row": "x", "bits": 2.5, "kl_mean": 0.6}]
    lines = tool.table([*cells, {"row": "all", "bits": 3.0, "kl_mean": 0.2}]).splitlines()
    assert lines[0] == "| | 2.5 bits | 3 bits |"
    assert lines[2:] == ["| all | 0.5000 (1.000) | 0.2000 (1.000) |", "| x | 0.6000 (1.200) | - |"]


def test_an_unknown_row_is_refused(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation", "--bits", "3", "--rows", "magic", "--text", "t", "--out", "o"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "'magic': expected one of all; recovered" in capsys.readouterr().err
