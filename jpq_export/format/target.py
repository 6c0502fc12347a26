"""What a board can do: the `Target` record and the TOML files it is read from, with inheritance and strict checks."""

from __future__ import annotations

import difflib
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jpq_export.errors import TargetError
from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.scheme import Scheme

if sys.version_info >= (3, 11):
    import tomllib
else:  # JetPack boards run Python 3.10
    import tomli as tomllib  # pyright: ignore[reportMissingImports] only installed on Python 3.10

KINDS = ("jetson", "rtx", "datacenter", "cpu")
GRAPHS = ("custom_op", "qdq")
ENGINES = ("tensorrt-rtx",)
GPU_NORMAL_WIDTHS = (3, 4)
SIGNED_BITS = (4, 8)  # ONNX's INT4 and INT8
RTX_SMS = (75, 80, 86, 89, 120, 121)  # what TensorRT-RTX 1.7 builds for; it refuses 87, 90, 100 and 110
GIB = 2**30  # memory is sold in binary gigabytes


@dataclass(frozen=True, slots=True)
class Target:
    """A board, in data-sheet numbers.

    fp16_tflops: dense, fp32 accumulation where the board distinguishes. op_overhead_us: fixed cost of one launched
    operator at batch 1. default_bits: bits per weight over the whole file when no budget is given. graph: which ONNX
    form is fast there, `jpq::LowBitMatMul` ("custom_op") or blocked DequantizeLinear where 2/4/8 bit ("qdq").
    tensorrt: version the board's system image carries, None when the board fixes none. engine: which engine is built
    on this machine beside the graphs. stored_bits: widths of the signed codes that engine knows, () when it takes any
    scheme; a code is stored in the narrowest that holds it. sources: where each number is from, by field.
    """

    name: str
    title: str
    kind: Literal["jetson", "rtx", "datacenter", "cpu"]
    memory_bytes: int
    bandwidth_gb_s: float
    fp16_tflops: float
    op_overhead_us: float
    default_bits: float
    graph: Literal["custom_op", "qdq"]
    sm: int | None = None
    tensorrt: str | None = None
    cuda: str | None = None
    jetpack: str | None = None
    power_mode: str | None = None
    engine: Literal["tensorrt-rtx"] | None = None
    stored_bits: tuple[int, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def normal_bits(self) -> tuple[int, ...]:
        """Widths whose codes stand for normal levels: where our own operators read them, at the rate memory gives.

        A GPU looks levels of 3 and 4 bits up in registers; an Orin has no instructions to spare for more.
        """
        if self.graph != "custom_op" or self.stored_bits:
            return ()
        return NORMAL_WIDTHS if self.kind == "cpu" else GPU_NORMAL_WIDTHS

    def fit(self, scheme: Scheme) -> Scheme:
        """The scheme of that width this target stores in fewest bits: with an integer zero where that saves a width."""
        whole = Scheme(scheme.bits, scheme.group_size, integer_zero=True)
        if self.stored_bits and self._container(whole) < self._container(scheme):
            return whole
        return scheme

    def stored_bytes(self, scheme: Scheme, rows: int, columns: int) -> int:
        """Bytes of a weight [rows, columns] as this target's engine or graph stores it."""
        if not self.stored_bits:
            return scheme.weight_bytes(rows, columns)
        signed = Scheme(int(self._container(scheme)), scheme.group_size, integer_zero=True)
        return signed.weight_bytes(rows, columns)

    def holds(self, scheme: Scheme) -> bool:
        """Whether a weight of this scheme can be stored for this target at all."""
        return not self.stored_bits or math.isfinite(self._container(scheme))

    def _container(self, scheme: Scheme) -> float:
        """Width of the narrowest signed code that holds it, infinite when none does."""
        return min((bits for bits in self.stored_bits if bits >= scheme.signed_bits), default=math.inf)


@dataclass(frozen=True, slots=True)
class _Key:
    """How one key of a target file is checked: `type`, and a range, choices or pattern."""

    type: Literal["text", "number", "integer", "table", "widths"]
    required: bool = True
    above: float = 0.0
    most: float = math.inf
    choices: tuple[str, ...] = ()
    pattern: str = r"\S.*"

    @property
    def expected(self) -> str:
        """For error messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.type == "widths":
            return f"a list of widths out of {', '.join(map(str, SIGNED_BITS))}, such as [4, 8]"
        if self.type == "text":
            return 'a version in quotes such as "10.3"' if self.pattern == VERSION else "a text that is not empty"
        if self.type == "table":
            return "a table [sources] of texts"
        most = f", at most {self.most:g}" if self.most < math.inf else ""
        return f"{'an integer' if self.type == 'integer' else 'a number'} above {self.above:g}{most}"

    def accepts(self, value: Any) -> bool:
        """True when `value` from TOML is of the type and in range."""
        if self.type == "table":
            return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        if self.type == "widths":
            return isinstance(value, list) and bool(value) and all(bits in SIGNED_BITS for bits in value)
        if self.type == "text":
            fits = isinstance(value, str) and re.fullmatch(self.pattern, value)
            return bool(fits) and (not self.choices or value in self.choices)
        kinds = (int,) if self.type == "integer" else (int, float)
        right_type = isinstance(value, kinds) and not isinstance(value, bool)  # True is an int to Python
        return right_type and math.isfinite(value) and self.above < value <= self.most


VERSION = r"\d+(\.\d+)+"
KEYS = {
    "title": _Key("text"),
    "kind": _Key("text", choices=KINDS),
    "memory_gb": _Key("number"),
    "bandwidth_gb_s": _Key("number"),
    "fp16_tflops": _Key("number"),
    "op_overhead_us": _Key("number"),
    "default_bits": _Key("number", above=1.0, most=16.0),
    "graph": _Key("text", choices=GRAPHS),
    "sm": _Key("integer", required=False),
    "tensorrt": _Key("text", required=False, pattern=VERSION),
    "cuda": _Key("text", required=False, pattern=VERSION),
    "jetpack": _Key("text", required=False, pattern=VERSION),
    "power_mode": _Key("text", required=False),
    "engine": _Key("text", required=False, choices=ENGINES),
    "stored_bits": _Key("widths", required=False),
    "sources": _Key("table", required=False),
}


def load_target(name_or_path: str | Path) -> Target:
    """A target by name ("jetson"), or from a file of the user's own ("my-board.toml").

    Raises:
        TargetError: unknown name, unreadable or malformed file; one line with file, key, got and expected.
    """
    path = _find(str(name_or_path), beside=Path(), who="--target")
    return _build(path, _read_chain(path))


def list_targets() -> tuple[Target, ...]:
    """All shipped targets, sorted by name."""
    return tuple(_build(path, _read_chain(path)) for path in _shipped().values())


def targets_folder() -> Path:
    """Where the shipped files are: inside the installed package, or `targets/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_targets"
    return installed if installed.is_dir() else package.parent / "targets"


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(targets_folder().glob("*.toml"), key=lambda path: path.stem)}


def _find(name: str, *, beside: Path, who: str) -> Path:
    """A shipped name, or a file (relative to `beside`) when it looks like one."""
    if name.endswith(".toml") or "/" in name or "\\" in name:
        path = beside / name
        if not path.is_file():
            raise TargetError(f"{who}: {path} is not a file; expected a target file or one of {', '.join(_shipped())}")
        return path
    shipped = _shipped()
    if name not in shipped:
        near = difflib.get_close_matches(name.lower(), shipped, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(shipped)
        raise TargetError(f"{who}: unknown target {name!r}; {hint}targets: {known}; or a file, my-board.toml")
    return shipped[name]


def _read_chain(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's keys over those it inherits."""
    here = path.resolve()
    if here in seen:
        names = " -> ".join(p.name for p in (*seen, here))
        raise TargetError(f"{path}: inherit: goes round in a circle ({names}); expected a chain that ends")
    values = _read(path)
    if "inherit" not in values:
        return values
    parent_name = values.pop("inherit")
    if not isinstance(parent_name, str) or not parent_name:
        raise TargetError(f"{path}: inherit: got {parent_name!r}, expected the name of a target or a .toml file")
    parent = _read_chain(_find(parent_name, beside=path.parent, who=f"{path}: inherit"), (*seen, here))
    # A number that is replaced loses the source of the one it replaces.
    inherited = {key: text for key, text in parent.pop("sources", {}).items() if key not in values}
    return {**parent, **values, "sources": inherited | values.get("sources", {})}


def _read(path: Path) -> dict[str, Any]:
    """One file, each key checked."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"{path}: cannot be read ({error.strerror}); expected a TOML file") from error
    except UnicodeDecodeError as error:
        raise TargetError(f"{path}: not UTF-8 text (byte {error.start}); expected a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{path}: not valid TOML: {error}; expected lines such as memory_gb = 8") from error
    for key, value in values.items():
        if key != "inherit":
            _check(path, key, value)
    return values


def _check(path: Path, key: str, value: Any) -> None:
    if key not in KEYS:
        near = difflib.get_close_matches(key, KEYS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected keys: inherit, {', '.join(KEYS)}"
        raise TargetError(f"{path}: unknown key {key!r}; {hint}")
    if not KEYS[key].accepts(value):
        raise TargetError(f"{path}: {key}: got {value!r}, expected {KEYS[key].expected}")
    if key == "sources" and (unknown := sorted(set(value) - set(KEYS))):
        raise TargetError(f"{path}: sources: unknown key {unknown[0]!r}; expected keys of this file, {', '.join(KEYS)}")


def _build(path: Path, values: dict[str, Any]) -> Target:
    missing = [key for key, rule in KEYS.items() if rule.required and key not in values]
    if missing:
        rule = KEYS[missing[0]]
        raise TargetError(f"{path}: {', '.join(missing)}: missing; expected {rule.expected}, or inherit from a target")
    if values["kind"] != "cpu" and "sm" not in values:
        raise TargetError(f"{path}: sm: missing; expected the compute capability without a dot, such as 87, for a GPU")
    if values.get("engine") == "tensorrt-rtx":
        _check_rtx(path, values)
    sources = {_FIELDS.get(key, key): text for key, text in sorted(values.get("sources", {}).items())}
    fields = {key: value for key, value in values.items() if key not in ("memory_gb", "sources")}
    numbers = {key: float(fields[key]) for key, rule in KEYS.items() if rule.type == "number" and key in fields}
    fields["stored_bits"] = tuple(sorted(values.get("stored_bits", ())))
    memory = round(values["memory_gb"] * GIB)
    return Target(**{**fields, **numbers, "name": path.stem, "memory_bytes": memory, "sources": sources})


def _check_rtx(path: Path, values: dict[str, Any]) -> None:
    if values["sm"] not in RTX_SMS:
        known = ", ".join(map(str, RTX_SMS))
        raise TargetError(f"{path}: engine: TensorRT-RTX builds for sm {known} only, got {values['sm']}; leave it out")
    if "stored_bits" not in values:
        raise TargetError(f"{path}: stored_bits: missing; expected {KEYS['stored_bits'].expected} beside engine")


_FIELDS = {"memory_gb": "memory_bytes"}
