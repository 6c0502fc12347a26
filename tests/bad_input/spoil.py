"""How bad input is made and how its message is checked: one line with what, where and the remedy, nothing left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from jpq_export.cli import main

Damage = Callable[[], object]
# command, exit code, what the line must say, what to spoil first
Case = tuple[str, int, tuple[str, ...], Damage | None]
WEIGHTS = Path("m/model.safetensors")


def export(rest: str = "", *, model: str = "m", target: str = "jetson") -> str:
    return f"export {model} --target {target} --effort quick --context 64 --out out {rest}"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file's bytes and every folder below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def message_of(result: Result) -> str:
    """The one line of a failed command; finished stages may stand before it."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("✓")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]


def check(bench: Path, command: str, code: int, says: tuple[str, ...]) -> None:
    before = contents(bench)
    result = CliRunner().invoke(main, shlex.split(command))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception  # shows where
    assert result.exit_code == code, result.output
    line = message_of(result)
    for part in says:
        assert part in line
    assert contents(bench) == before, "something was left behind or changed"
    assert not list((bench.parent.parent).rglob("cache/**/*partial*"))


def check_case(bench: Path, case: Case) -> None:
    """`check` of a case, after its damage."""
    command, code, says, damage = case
    if damage:
        damage()
    check(bench, command, code, says)


def write(name: str, content: str | bytes) -> Damage:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(name: str, edit: Callable[[Any], object]) -> Damage:
    def damage() -> None:
        path = Path(name)
        raw = json.loads(path.read_text(encoding="utf-8"))
        edit(raw)
        path.write_text(json.dumps(raw), encoding="utf-8")

    return damage


def edit_weights(edit: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage() -> None:
        tensors = load_file(WEIGHTS)
        edit(tensors)
        save_file(tensors, WEIGHTS, metadata={"format": "pt"})

    return damage


def cut(name: str, keep: float) -> Damage:
    def damage() -> None:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: int(len(content) * keep)])

    return damage


def flip(name: str) -> Damage:
    def damage() -> None:
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return damage


def remove(name: str) -> Damage:
    return lambda: Path(name).unlink()


def put_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def change_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].copy()


def pickle_weights() -> None:
    WEIGHTS.unlink()
    Path("m/pytorch_model.bin").write_bytes(b"\x80\x04.")


def add_token(raw: dict[str, Any]) -> None:
    raw["model"]["vocab"]["zz"] = 400
