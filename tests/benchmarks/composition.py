"""Every ordered pair of passes on every network of the contract kit; fills the tables of docs/composition.md.

make composition                                   all of it, in two processes: about an hour and a half of one core
make composition COMPOSE="--onnx turns"            ONNX files of one pair for each two plugins and network
make composition COMPOSE="--networks lstm gru"     these networks alone

Rows go to a file as they are found, and what stands there is not run again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from composing import (
    NETWORKS,
    PAIRS,
    SIGNS,
    Applied,
    chained,
    first,
    hold,
    in_turns,
    matrix,
    refusal,
    refusals,
    untouched,
)

ROOT = Path(__file__).resolve().parents[2]
Pair = tuple[str, str]
Row = dict[str, Any]


def rows_of(network: str, onnx: str, known: set[Pair], rows: Path) -> list[Row]:
    """One row for every pair on `network` that is not known; each is also appended to the file."""
    warnings.filterwarnings("ignore")
    made = []
    shift = list(NETWORKS).index(network)
    for pair in PAIRS:
        if pair in known or refusal(*pair):
            continue
        row = {"network": network, "first": pair[0], "second": pair[1], **_verdict(pair, network, onnx, shift)}
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        made.append(row)
    for cached in (first, chained, untouched):
        cached.cache_clear()
    return made


def _verdict(pair: Pair, network: str, onnx: str, shift: int) -> Row:
    try:
        applied = chained(*pair, network=network)
        if not (len(applied.reports) == 2 and applied.all_edit):
            return {"verdict": "nothing", "reasons": _reasons(pair, applied)}
        exports = onnx == "all" or (onnx == "turns" and pair in _turn(shift))
        hold(*pair, applied=applied, onnx=exports)
        return {"verdict": "composes", "onnx": exports}
    except Exception as error:
        return {"verdict": "broken", "reasons": [f"{type(error).__name__}: {error}"]}


def _turn(shift: int) -> set[Pair]:
    """Another choice for every network."""
    return in_turns([*PAIRS[shift:], *PAIRS[:shift]])


def _reasons(pair: Pair, applied: Applied) -> list[str]:
    if len(applied.reports) < 2 and not applied.refused:
        return [f"`{pair[0]}` finds nothing to do first"]
    return sorted(applied.reasons)


def collected(networks: list[str], onnx: str, jobs: int, rows: Path) -> list[Row]:
    """The rows of the file, and those that it lacks."""
    lines = rows.read_text().splitlines() if rows.exists() else []
    found = {(r["network"], r["first"], r["second"]): r for r in map(json.loads, lines) if r["verdict"] != "broken"}
    known = {name: {key[1:] for key in found if key[0] == name} for name in networks}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        pending = {pool.submit(rows_of, name, onnx, known[name], rows): name for name in networks}
        for number, future in enumerate(as_completed(pending), 1):
            found |= {(r["network"], r["first"], r["second"]): r for r in future.result()}
            print(f"{number}/{len(pending)} {pending[future]}", flush=True)
    return list(found.values())


def verdicts_of(rows: list[Row]) -> dict[Pair, str]:
    """A pair composes where it does so on any network; `SystemExit` names those that are broken on one."""
    broken = [f"{' → '.join(_pair(r))} on {r['network']}: {r['reasons'][0]}" for r in rows if r["verdict"] == "broken"]
    if broken:
        raise SystemExit("\n".join(broken))
    composing = {_pair(row) for row in rows if row["verdict"] == "composes"}
    return {pair: "refused" if refusal(*pair) else "composes" if pair in composing else "nothing" for pair in PAIRS}


def _pair(row: Row) -> Pair:
    return row["first"], row["second"]


def idle(rows: list[Row], verdicts: dict[Pair, str]) -> str:
    """Why pairs find nothing to do together; those with the same reasons share a row."""
    reasons: dict[Pair, Counter[str]] = defaultdict(Counter)
    for row in rows:
        reasons[_pair(row)].update(row.get("reasons", []))
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one, other in (pair for pair in PAIRS if verdicts[pair] == "nothing"):
        why = "; ".join(reason for reason, _ in reasons[one, other].most_common(3))
        alike[one, why or "nothing is left for it"].append(other)
    lines = [["first", "then", "why"], ["---"] * 3]
    lines += [[f"`{one}`", ", ".join(f"`{name}`" for name in others), why] for (one, why), others in alike.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(text: str, rows: list[Row]) -> str:
    """The page `text` with what is generated between its marks put in anew."""
    verdicts = verdicts_of(rows)
    both = [row for row in rows if row["verdict"] == "composes"]
    count, networks = Counter(verdicts.values()), len({row["network"] for row in rows})
    shares = ", ".join(f"{count[verdict]} {SIGNS[verdict]}" for verdict in SIGNS)
    blocks = {
        "matrix": f"{matrix(verdicts)}\n\nOf {len(PAIRS)} pairs {shares}.",
        "held": f"On {networks} networks both passes of a pair made edits {len(both):,} times; "
        f"{sum(row['onnx'] for row in both):,} of the results were exported to ONNX as well.",
        "refusals": refusals(),
        "idle": idle(rows, verdicts),
    }
    for name, block in blocks.items():
        text = re.sub(f"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m, b=block: m[1] + b + m[2], text, flags=re.S)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--onnx", choices=("all", "turns", "none"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "composition.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "composition.md")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = collected(options.networks, options.onnx, options.jobs, options.rows)
    options.page.write_text(written(options.page.read_text(), rows))


if __name__ == "__main__":
    main()
