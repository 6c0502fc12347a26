"""What a step says at its end, and how it says that it cannot run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


class CannotRun(Exception):
    """Something the step needs is not on this machine; the message says what."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`rehearse`: no GPU; interpreter and host shim on the CPU, tiny shapes. `bundle`: of `decode`, or None."""

    quick: bool = False
    rehearse: bool = False
    bundle: str | None = None
    scratch: str = "."

    @property
    def device(self) -> str:
        """Torch's name of where the kernels run."""
        return "cpu" if self.rehearse else "cuda"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`reason`: one line, why it failed or did not run; `facts`: for people; `rows`: a table, a dict each."""

    status: str
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        return asdict(self)
