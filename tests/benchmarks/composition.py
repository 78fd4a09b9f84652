"""Every ordered pair of passes on every network of the contract kit; writes docs/composition.md.

make composition                                   all of it, in two processes: about an hour and a half of one core
make composition COMPOSE="--onnx turns"            ONNX files of one pair for each two plugins and network
make composition COMPOSE="--networks lstm gru"     these networks alone

Rows go to a file as they are found, and what stands there is not run again: an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from composing import NAMES, NETWORKS, PAIRS, REGISTRY, Applied, chained, first, hold, in_turns, matrix, refusal, refusals

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "composition.md"
Row = dict[str, Any]


def rows_of(network: str, onnx: str, known: set[tuple[str, str]], rows: Path) -> list[Row]:
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
    first.cache_clear()
    return made


def _verdict(pair: tuple[str, str], network: str, onnx: str, shift: int) -> Row:
    try:
        applied = chained(*pair, network=network)
        if not (len(applied.reports) == 2 and applied.all_edit):
            return {"verdict": "nothing", "reasons": _reasons(pair, applied)}
        exports = onnx == "all" or (onnx == "turns" and pair in _turn(shift))
        hold(*pair, applied=applied, onnx=exports)
        return {"verdict": "composes", "onnx": exports}
    except Exception as error:
        return {"verdict": "broken", "reasons": [f"{type(error).__name__}: {error}"]}


def _turn(shift: int) -> set[tuple[str, str]]:
    """Another choice for every network."""
    return in_turns([*PAIRS[shift:], *PAIRS[:shift]])


def _reasons(pair: tuple[str, str], applied: Applied) -> list[str]:
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


def verdicts_of(rows: list[Row]) -> dict[tuple[str, str], str]:
    """A pair composes where it does so on any network; `SystemExit` where it is broken on one."""
    seen = defaultdict(set)
    for row in rows:
        seen[row["first"], row["second"]].add(row["verdict"])
    broken = [f"{r['first']} → {r['second']} on {r['network']}: {r['reasons'][0]}" for r in rows if r["verdict"] == "broken"]
    if broken:
        raise SystemExit("\n".join(broken))
    made = {pair: "composes" if "composes" in verdicts else "nothing" for pair, verdicts in seen.items()}
    return {pair: "refused" if refusal(*pair) else made.get(pair, "nothing") for pair in PAIRS}


def idle(rows: list[Row], verdicts: dict[tuple[str, str], str]) -> str:
    """Why pairs find nothing to do together, those with the same reasons in one row."""
    reasons = defaultdict(Counter)
    for row in rows:
        reasons[row["first"], row["second"]].update(row.get("reasons", []))
    alike = defaultdict(list)
    for one, other in (pair for pair in PAIRS if verdicts[pair] == "nothing"):
        most = [why for why, _ in reasons[one, other].most_common(2)]
        alike[one if most == [f"`{one}` finds nothing to do first"] else f"{one} → {other}", "; ".join(most)].append(other)
    lines = []
    for (chain, why), others in alike.items():
        label = f"`{chain}` → " + ", ".join(f"`{o}`" for o in others) if "→" not in chain else chain
        lines.append((label, why))
    return "\n".join(f"| {label} | {why} |" for label, why in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--onnx", choices=("all", "turns", "none"), default="all")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "composition.jsonl")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = collected(options.networks, options.onnx, options.jobs, options.rows)
    verdicts = verdicts_of(rows)
    print(len(NAMES), len(REGISTRY.passes), Counter(verdicts.values()))


if __name__ == "__main__":
    main()
