"""Every ordered pair of passes on every network of the contract kit; fills the tables of docs/composition.md.

make composition                                   all of it, in two processes: about an hour and a half of one core
make composition COMPOSE="--onnx turns"            every pair exported on one network only, instead of on all
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
from composing import (
    NETWORKS,
    PAIRS,
    SIGNS,
    Applied,
    chained,
    first,
    hold,
    matrix,
    refusal,
    refusals,
    untouched,
)

ROOT = Path(__file__).resolve().parents[2]
Pair = tuple[str, str]
Row = dict[str, Any]
IDLE = "the first finds nothing to do"


def rows_of(network: str, pairs: list[Pair], onnx: bool, file: Path) -> None:
    """Appends one row for each of `pairs` on `network`."""
    warnings.filterwarnings("ignore")
    for pair in pairs:
        row = {"network": network, "first": pair[0], "second": pair[1], **_verdict(pair, network, onnx)}
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    for cached in (first, chained, untouched):
        cached.cache_clear()


def _verdict(pair: Pair, network: str, onnx: bool) -> Row:
    try:
        applied = chained(*pair, network=network)
        if not (len(applied.reports) == 2 and applied.all_edit):
            return {"verdict": "nothing", "reasons": _reasons(pair, applied)}
        hold(*pair, applied=applied, onnx=onnx)
        return {"verdict": "composes", "onnx": onnx}
    except Exception as error:
        return {"verdict": "broken", "reasons": [f"{type(error).__name__}: {error}"]}


def _reasons(pair: Pair, applied: Applied) -> list[str]:
    if not (applied.reports and applied.reports[0].modified):
        return [IDLE]
    return sorted(applied.reasons)


def read(file: Path) -> dict[tuple[str, Pair], Row]:
    """The last row of each pair on each network."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = {(row["network"], _pair(row)): row for row in map(json.loads, lines)}
    return {key: row for key, row in rows.items() if not refusal(*key[1])}


def missing(found: dict[tuple[str, Pair], Row], networks: list[str], onnx: str) -> dict[str, list[Pair]]:
    """Pairs to run, by network: those without a row, those that were broken, and with `all` those not exported."""

    def lacks(network: str, pair: Pair) -> bool:
        row = found.get((network, pair), {"verdict": "broken"})
        return row["verdict"] == "broken" or (onnx == "all" and not row.get("onnx", True))

    return {name: [pair for pair in PAIRS if not refusal(*pair) and lacks(name, pair)] for name in networks}


def in_turn(found: dict[tuple[str, Pair], Row], networks: list[str]) -> dict[str, list[Pair]]:
    """Pairs of which no result was exported yet, each on one of the networks on which it composes."""
    chosen: dict[str, list[Pair]] = {name: [] for name in networks}
    for number, pair in enumerate(PAIRS):
        rows = [row for (name, other), row in found.items() if other == pair and name in chosen]
        composing = [row for row in rows if row["verdict"] == "composes"]
        if composing and not any(row["onnx"] for row in composing):
            chosen[composing[number % len(composing)]["network"]].append(pair)
    return chosen


def run(pairs: dict[str, list[Pair]], onnx: bool, jobs: int, file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        pending = {pool.submit(rows_of, name, own, onnx, file): name for name, own in pairs.items() if own}
        for number, future in enumerate(as_completed(pending), 1):
            future.result()
            print(f"{number}/{len(pending)} {pending[future]}", flush=True)


def collected(networks: list[str], onnx: str, jobs: int, file: Path) -> list[Row]:
    """The rows of the file, and those that it lacked."""
    run(missing(read(file), networks, onnx), onnx == "all", jobs, file)
    if onnx == "turns":
        run(in_turn(read(file), networks), True, jobs, file)
    return list(read(file).values())


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
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one, other in (pair for pair in PAIRS if verdicts[pair] == "nothing"):
        alike[one, _why([row["reasons"] for row in rows if _pair(row) == (one, other)])].append(f"`{other}`")
    merged: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (one, why), others in alike.items():
        merged[", ".join(others), why].append(f"`{one}`")
    lines = [["first", "then", "why"], ["---"] * 3, *([", ".join(ones), *key] for key, ones in merged.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _why(reasons: list[list[str]]) -> str:
    """The most frequent reasons on the networks on which the first pass has made edits."""
    worked = [own for own in reasons if own != [IDLE]]
    most = Counter(why for own in worked for why in own).most_common(2)
    return "; ".join(why for why, _ in most) or ("the second finds nothing to do" if worked else IDLE)


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
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        text = before + mark + block + "\n" + after[after.index("<!-- end -->") :]
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
