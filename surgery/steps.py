"""What a step of a run did, and where the model stands after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .measurement import Latency, Measurement
from .passes import Edit, PassReport, Skip
from .verification import Verification

Outcome = Literal["kept", "softened", "undone", "stopped"]


@dataclass(frozen=True)
class StepLatency:
    """ONNX Runtime on the example inputs; all three were called in turn, round by round."""

    original: Latency
    result: Latency
    """After the step, against the original."""
    step: Latency
    """After the step, against before it."""


@dataclass(frozen=True)
class Standing:
    """What a model of a run weighs, how far it is from the original, and how fast it is."""

    measurement: Measurement
    onnx_bytes: int
    verification: Verification
    latency: StepLatency | None = None
    """None where it was not measured."""


@dataclass(frozen=True)
class StepResult:
    """One step of a run, `capture` being the first."""

    name: str
    report: PassReport
    standing: Standing
    outcome: Outcome = "kept"
    """`softened`: kept with milder options; `undone`: the model is as before the step; `stopped`: so it is, and the
    steps after this one were not run."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the pass as it was last applied."""
    attempts: tuple[str, ...] = ()
    """What was tried and broke the budget, or could not be done, a sentence each."""

    @property
    def undone(self) -> bool:
        return self.outcome in ("undone", "stopped")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without times."""
        standing = self.standing
        return {
            **asdict(self.report),
            "name": self.name,
            "outcome": self.outcome,
            "options": dict(self.options),
            "attempts": list(self.attempts),
            "measurement": asdict(standing.measurement),
            "onnx_bytes": standing.onnx_bytes,
            "verification": standing.verification.to_dict(),
        }

    def times(self) -> dict[str, Any]:
        """JSON-able; empty where nothing was measured."""
        return asdict(self.standing.latency) if self.standing.latency else {}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], times: Mapping[str, Any]) -> StepResult:
        """Raises KeyError, TypeError or ValueError where they do not come from `to_dict` and `times`."""
        latency = {name: Latency(**{**one, "quartiles": tuple(one["quartiles"])}) for name, one in times.items()}
        return cls(
            name=raw["name"],
            report=PassReport(
                tuple(Edit(**{**edit, "also": tuple(edit["also"])}) for edit in raw["edits"]),
                tuple(Skip(**skip) for skip in raw["skips"]),
                tuple(raw["notes"]),
            ),
            standing=Standing(
                Measurement(**raw["measurement"]),
                raw["onnx_bytes"],
                Verification.from_dict(raw["verification"]),
                StepLatency(**latency) if latency else None,
            ),
            outcome=raw["outcome"],
            options=raw["options"],
            attempts=tuple(raw["attempts"]),
        )
