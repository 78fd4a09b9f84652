"""PyTorch's own database of operators, each between two layers: captured, pruned, exported, and held to proof.

make operators                                     all of them: about an hour of one core; fills docs/operators.md
make operators OPERATORS="--names sin nn.functional.glu"
make operators OPERATORS="--no-onnx"               without export, ten minutes

Rows go to a file as they are found, and what stands there is not run again. Every operator has a process of its own.
`tests/operator_sweep.py` says what is done with an operator.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from models import isolated

sys.path.insert(0, str(Path(__file__).parents[1]))
from operator_sweep import OUTCOMES, Row, database, examined, name_of

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0
"""Seconds that an operator may take."""


def stored(file: Path) -> dict[str, Row]:
    """Rows by name; the last one of each counts."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def collected(names: Sequence[str], part: str, onnx: bool, file: Path) -> list[Row]:
    """The rows of the file, and those that it lacked."""
    known, rows = stored(file), []
    number, parts = map(int, part.split("/"))
    warm_up(onnx)
    for op in database()[number - 1 :: parts]:
        name = name_of(op)
        if names and name not in names:
            continue
        row = known.get(name)
        if row is None or (onnx and row.outcome in ("pruned", "unprunable") and not row.onnx):
            try:
                row = isolated(examined, op, onnx, limit=LIMIT)
            except RuntimeError as error:
                row = Row(name, "crash", str(error))
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
        print(line(row), flush=True)
    return rows


def warm_up(onnx: bool) -> None:
    """First-call costs, which forked processes inherit."""
    examined(next(op for op in database() if op.name == "sin"), onnx)


def line(row: Row) -> str:
    numbers = ["" if n is None else f"{n:.0e}" for n in (row.error, row.parity)]
    return f"{row.name:44} {row.outcome:12} {numbers[0]:6} {row.onnx[:20]:20} {numbers[1]:6} {row.why[:110]}"


def page(rows: Sequence[Row]) -> str:
    """docs/operators.md."""
    tried = [row for row in rows if row.outcome != "out of scope"]
    exported = [row for row in tried if row.onnx]
    right = [row for row in exported if row.onnx == "right"]
    largest = [max((getattr(row, name) or 0.0 for row in tried), default=0.0) for name in ("error", "parity")]
    parts = [
        HEAD.format(all=len(rows), tried=len(tried), exported=len(exported), right=len(right), largest=largest),
        counted(rows),
        *(section(title, [row for row in rows if row.outcome == outcome]) for outcome, title in TITLES.items()),
        refusals([row for row in tried if row.onnx.startswith("refused")]),
    ]
    return "\n".join(filter(None, parts)) + "\n"


HEAD = """# Operators

Written by `make operators`, so far for {all} of the 702 entries of PyTorch's own database of operators
(`torch.testing._internal.common_methods_invocations.op_db`). Each, with its own samples, stands between a convolution
and a layer that reads its result. The network is captured, `prune_filters` takes half of the channels, and what is
left is held against PyTorch's own run of the original with these channels at zero; which they are is read off the
values that are left. The result is exported and run in ONNX Runtime. {tried} entries take floats (N, C, …) and give
numbers.

Largest deviation of removed from masked: {largest[0]:.0e}. {exported} were tried in ONNX Runtime as well:
{right} are exported, and deviate by {largest[1]:.0e} at most; the others are refused at export, by name.
"""

TITLES = {
    "wrong": "Wrong",
    "crash": "Crashes",
    "pruned": "Pruned",
    "unprunable": "Left whole, and why",
    "refused": "Refused at capture",
    "out of scope": "Out of scope",
}


def counted(rows: Sequence[Row]) -> str:
    counts = Counter(row.outcome for row in rows)
    lines = [f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES]
    return "\n".join(["| outcome | operators |", "|---|---:|", *lines, ""])


def section(title: str, rows: Sequence[Row]) -> str:
    """Names under each reason, most frequent first."""
    if not rows:
        return ""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(kind(row), []).append(f"`{row.name}`")
    if list(kinds) == [""]:
        return f"## {title}\n\n{', '.join(kinds[''])}\n"
    order = sorted(kinds, key=lambda why: (-len(kinds[why]), why))
    lines = [f"| {escaped(why)} | {len(kinds[why])} | {', '.join(kinds[why])} |" for why in order]
    return "\n".join([f"## {title}", "", "| why | | operators |", "|---|---:|---|", *lines, ""])


def kind(row: Row) -> str:
    """The reason without what names the operator, so that equal reasons are counted together."""
    words = [word if not word.startswith("aten") else "…" for word in row.why.partition(": ")[2].split()]
    return " ".join(words) if row.outcome == "unprunable" else row.why.partition("(")[0][:100]


def refusals(rows: Sequence[Row]) -> str:
    return section("Refused at export", [Row(row.name, "refused", row.onnx[:100]) for row in rows])


def escaped(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="*", default=[], help="such as sin or nn.functional.glu; all without one")
    parser.add_argument("--part", default="1/1", help="such as 2/3: every third operator from the second on")
    parser.add_argument("--no-onnx", action="store_true", help="without export")
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "operators.jsonl")
    parser.add_argument("--page", type=Path, help="docs/operators.md, where all operators are asked for")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = collected(options.names, options.part, not options.no_onnx, options.rows)
    print(counted(rows))
    target = options.page or (None if options.names or options.part != "1/1" else ROOT / "docs" / "operators.md")
    if target:
        target.write_text(page(rows))
    return int(any(row.outcome in ("wrong", "crash") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
