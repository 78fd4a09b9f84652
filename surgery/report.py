"""A run in words and tables: one structure, shown as JSON, Markdown, HTML, or on a terminal."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import packages_distributions, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Operation


@dataclass(frozen=True)
class Table:
    """Rows of text under a title; numbers are already formatted."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


GROWN = 1.01
"""Times the bytes before; less is names and constants."""
SLOWER = 0.97
"""Times the speed before, in three rounds of four; nearer to 1 are the machine's whims."""


def summary(operation: Operation) -> dict[str, Any]:
    """Everything but times: the same for every run of the same recipe, model and data on one machine."""
    import onnx
    import onnxruntime
    import torch

    from . import __version__

    capture = operation.original
    return {
        "recipe": operation.plan.lock,
        "recipe_sha256": operation.plan.hash,
        "versions": {
            "surgery": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            **_versions({type(step).__module__.partition(".")[0] for step in operation.plan.steps}),
        },
        "capture": {
            "error": capture.capture_error,
            "dynamic_batch": capture.dynamic_batch,
            "notes": list(capture.notes),
        },
        "steps": [_plain(step.to_dict()) for step in operation.steps[1:]],
        "before": _plain(asdict(operation.before)),
        "after": _plain(asdict(operation.after)),
        "verification": operation.verification.to_dict(),
        "bytes": operation.sizes,
        "passed": operation.passed,
    }


def _versions(packages: set[str]) -> dict[str, str]:
    """Of the distributions that passes come from, by name."""
    known = packages_distributions()
    return {name: version(name) for package in sorted(packages) for name in sorted(set(known.get(package, ())))}


def timings(operation: Operation) -> dict[str, Any]:
    """Measured times and the machine they were measured on."""
    return {
        "machine": {"processor": platform.machine(), "system": platform.system(), "python": platform.python_version()},
        "onnxruntime_latency": {name: asdict(value) for name, value in operation.latency.items()},
        "steps": [step.times() for step in operation.steps[1:]],
    }


def to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def tables(summary: Mapping[str, Any], timings: Mapping[str, Any]) -> list[Table]:
    """What a person reads first: before and after, then what each pass did and left alone."""
    result = [
        _comparison(summary, timings),
        proof(summary["verification"], _bounds_fidelity(summary["recipe"]["budget"])),
        _way(summary, timings),
    ]
    if summary["capture"]["notes"]:
        result.append(Table("Capture", ("note",), tuple((note,) for note in summary["capture"]["notes"])))
    for number, step in enumerate(summary["steps"], 1):
        rows = [("tried", "", text, "") for text in step["attempts"]]
        rows += [("edit", e["layer"], e["what"], _numbers(e["numbers"])) for e in step["edits"]]
        rows += [("skip", s["layer"], s["why"], "") for s in step["skips"]]
        rows += [("note", "", text, "") for text in step["notes"]]
        result.append(
            Table(
                f"{number}. {step['name']}: {_outcome(step)}{len(step['edits'])} edited, {len(step['skips'])} skipped",
                ("", "layer", "reason", "numbers"),
                tuple(rows),
            )
        )
    return result


def _bounds_fidelity(budget: Mapping[str, Any]) -> bool:
    return any(bound is not None for name, bound in budget.items() if name != "parity")


def _outcome(step: Mapping[str, Any]) -> str:
    return "" if step["outcome"] == "kept" else f"{step['outcome'].upper()}, "


def _way(summary: Mapping[str, Any], timings: Mapping[str, Any]) -> Table:
    """The model after each step."""
    columns = ("after", "parameters", "MACs", "ONNX bytes", "speed", "fidelity", "")
    rows = []
    before, size = summary["before"], summary["bytes"].get("original.onnx", 0)
    passes = summary["recipe"]["passes"]
    for number, (step, times) in enumerate(zip(summary["steps"], timings["steps"], strict=True), 1):
        weights = step["measurement"]
        speed = f"{times['result']['ratio']:.2f}×" if times else ""
        counts = (_parameters(weights), weights["macs"], step["onnx_bytes"])
        rows.append(
            (
                f"{number}. {step['name']}",
                *(f"{count:,}" if count else "–" for count in counts),
                speed,
                _fidelity_in_short(step["verification"]["fidelity"]),
                "; ".join((*_course(step, passes[number - 1], passes[number:]), *_remarks(step, before, size, times))),
            )
        )
        before, size = weights, step["onnx_bytes"]
    return Table("After each step", columns, tuple(rows))


def _fidelity_in_short(fidelity: Mapping[str, Any]) -> str:
    if fidelity["accuracy_candidate"] is not None:
        return f"accuracy {fidelity['accuracy_candidate']:.2%}"
    noise = f"SQNR {_show(fidelity['sqnr_db'])} dB"
    if fidelity["top1_agreement"] is not None:
        return f"same class {fidelity['top1_agreement']:.2%}, {noise}"
    return noise


def _course(step: Mapping[str, Any], asked: Mapping[str, Any], left: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What became of a step that did not go as asked; `left`: the passes after it."""
    options = asked[step["name"]]
    changed = [f"{key} {_show(value)}" for key, value in step["options"].items() if value != options.get(key)]
    if step["outcome"] == "softened":
        yield f"softened to {', '.join(changed)}"
    elif step["outcome"] == "stopped" and left:
        yield f"stopped, not run: {', '.join(name for each in left for name in each if name != 'on_break')}"
    elif step["outcome"] != "kept":
        yield step["outcome"]


def _remarks(step: Mapping[str, Any], before: Mapping[str, Any], size: int, times: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must not miss. A step is faster if it won three rounds of four; `size`: of the file before it."""
    if step["outcome"] == "kept" and step["verification"]["shortfalls"]:
        yield "BUDGET BROKEN"
    if step["outcome"] == "kept" and not step["edits"]:
        yield "nothing changed, see its skips" if step["skips"] else "nothing to do"
    now = step["measurement"]
    counts = (("parameters", _parameters(before), _parameters(now)), ("MACs", before["macs"], now["macs"]))
    smaller = [what for what, old, new in counts if old and 0 < new < 0.99 * old]
    if smaller and times and times["step"]["quartiles"][0] <= 1:
        yield f"fewer {' and '.join(smaller)}, NOT faster"
    elif step["edits"] and times and times["step"]["quartiles"][1] < SLOWER:
        yield f"SLOWER: {times['step']['ratio']:.2f}× the speed before it"
    if step["edits"] and size and step["onnx_bytes"] > GROWN * size:
        yield "the ONNX file GREW"


def _comparison(summary: Mapping[str, Any], timings: Mapping[str, Any]) -> Table:
    before, after, fidelity = summary["before"], summary["after"], summary["verification"]["fidelity"]
    rows: list[tuple[str, ...]] = []
    if fidelity.get("accuracy_reference") is not None:
        a, b = fidelity["accuracy_reference"], fidelity["accuracy_candidate"]
        rows.append(("accuracy", f"{a:.2%}", f"{b:.2%}", f"{(b - a) * 100:+.2f} points"))
    if _parameters(after):
        rows.append(_row("parameters", before["parameters"], after["parameters"]))
    rows.append(_row("bytes of weights", before["stored_bytes"], after["stored_bytes"]))
    rows.append(_row("MACs", before["macs"], after["macs"]))
    if "model.onnx" in summary["bytes"]:
        rows.append(_row("ONNX bytes", summary["bytes"]["original.onnx"], summary["bytes"]["model.onnx"]))
    if "model.surgery" in summary["bytes"]:
        dense = 4 * before["parameters"]
        rows.append(_row("pack bytes (before: float32)", dense, summary["bytes"]["model.surgery"]))
    times = timings["onnxruntime_latency"]
    if times:
        low, high = times["result"]["quartiles"]
        milliseconds = [f"{times[name]['seconds'] * 1e3:.3f} ms" for name in ("original", "result")]
        rows.append(
            (
                "ONNX Runtime latency",
                *milliseconds,
                _speed(times["result"]["ratio"], low, high),
            )
        )
    return Table(f"{summary['recipe']['name']}: before and after", ("", "before", "after", "change"), tuple(rows))


def _parameters(weights: Mapping[str, Any]) -> int:
    """0 where a part of what is stored is none, but integers and indices, so that the number says nothing.

    Statistics of BatchNorm are a hundredth of it.
    """
    return int(weights["parameters"]) if weights["parameter_bytes"] > 0.95 * weights["stored_bytes"] else 0


def _speed(ratio: float, low: float, high: float) -> str:
    if low <= 1 <= high or SLOWER <= ratio <= 1 / SLOWER:
        return f"{ratio:.2f}× as fast, no clear difference (quartiles {low:.2f}–{high:.2f})"
    return f"{ratio:.2f}× as fast{', SLOWER' if ratio < 1 else ''} (quartiles {low:.2f}–{high:.2f})"


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.1%} of before" if before else ""


def proof(verification: Mapping[str, Any], has_budget: bool = False) -> Table:
    """`Verification.to_dict()` as a table."""
    rows = [(f"fidelity: {key}", _show(value)) for key, value in verification["fidelity"].items() if value is not None]
    for run in [*verification["parity"], *verification["devices"]]:
        verdict = "holds" if run["passed"] else "BROKEN"
        rows.append(
            (f"parity: {run['runtime']}", f"off by {_show(run['relative_error'])} of {_show(run['bound'])}, {verdict}")
        )
    rows += [("shortfall", text) for text in verification["shortfalls"]]
    rows += [("not measured", text) for text in verification["unmeasured"]]
    rows.append(("verdict", _verdict(verification, has_budget)))
    return Table("Proof", ("question", "answer"), tuple(rows))


def _verdict(verification: Mapping[str, Any], has_budget: bool) -> str:
    broken = verification["broken"]
    compared = verification["parity"] or verification["devices"]
    answers = ["parity BROKEN" if "parity" in broken else "parity holds" if compared else "parity not measured"]
    if has_budget:
        kept = "budget holds as far as it was measured" if verification["unmeasured"] else "budget holds"
        answers.append("budget BROKEN" if "fidelity" in broken else kept)
    else:
        answers.append("fidelity BROKEN" if "fidelity" in broken else "no budget bounds the fidelity")
    return f"{'passed' if verification['passed'] else 'NOT passed'} ({', '.join(answers)})"


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {_show(value)}" for key, value in numbers.items())


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_markdown(summary: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    parts = [f"# {summary['recipe']['name']}", summary["recipe"]["description"]]
    for table in tables(summary, timings):
        lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(f"## {table.title}\n\n{body}")
    return "\n\n".join(part for part in parts if part) + "\n"


_STYLE = (
    "body{font:16px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.3rem .8rem;text-align:left}"
)


def to_html(summary: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    title = html.escape(summary["recipe"]["name"])
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"]
    parts.append(f"<h1>{title}</h1><p>{html.escape(summary['recipe']['description'])}</p>")
    for table in tables(summary, timings):
        head = "".join(f"<th>{html.escape(c)}</th>" for c in table.columns)
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
        parts.append(f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>")
    return "\n".join(parts) + "</html>\n"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
