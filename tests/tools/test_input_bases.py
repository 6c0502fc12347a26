"""tools/input_bases.py: every basis is of the same product, and errors are those of the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture
def tool(load_tool: Any) -> Any:
    return load_tool("input_bases")


@pytest.mark.parametrize(("name", "columns", "expected"), [("layers.0.attn.o", 192, 2), ("layers.0.mlp.down", 1024, 3)])
def test_every_basis_is_of_the_same_product(tool: Any, name: str, columns: int, expected: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(rows, columns, generator=generator) for rows in (16, 200))
    found = tool.bases(name, W, x.T @ x, 64)
    assert len(found) == expected
    whole = ((x @ W.T) ** 2).sum()
    for other, H in found.values():
        torch.testing.assert_close(((other @ H) * other).sum(), whole, rtol=1e-4, atol=0)
    assert len({float(other[0, 0]) for other, _ in found.values()}) == expected  # and they differ


def test_an_error_is_that_of_the_product(tool: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(8, 64, generator=generator), torch.randn(300, 64, generator=generator)
    few, many = (tool.error(W, x.T @ x, bits) for bits in (2, 4))
    assert 0 < many < 0.2 * few < 0.2 * float(((x @ W.T) ** 2).sum())
