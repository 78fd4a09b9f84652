"""docs/benchmarks.md and its plots, from the rows of bench.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEAD = """# Benchmarks

What the shipped recipes do to trained networks, without labels; `dense_sparse_dense` alone trains, towards the outputs
of the network as it was, on the images that calibrate the others (`make bench BENCH="--recipes dense_sparse_dense"`).
`make bench` writes this page: `make bench BENCH=quick` is its first part alone, `make bench BENCH=torchvision` the
last. Top-1 is that of the ONNX file in ONNX Runtime. Times are those of ONNX Runtime on one thread, medians of calls
in turn with the unchanged model; `faster` is the median of the ratios, quartiles in brackets. Pack is `model.surgery`,
source and weights entropy-coded. Numbers in brackets are shares of the original's. Seconds are those of the whole run,
with its proof, on 2 shared cores. `low_rank` keeps layers that are no faster, by times it measures: two runs may choose
otherwise and differ by a point (`make bench BENCH=quick` twice: 91.25 and 90.19 %).
All figures with their digits: [benchmarks.jsonl](benchmarks.jsonl).
"""
QUICK = 256
"""Images that calibrate in the quick benchmark."""
COLUMNS = ["recipe", "top-1, %", "MACs", "ONNX bytes", "pack bytes", "batch of 1, ms", "faster", "batch of 32, faster"]
COLUMNS += ["parity", "s"]


def write_page(path: Path, rows: Sequence[Row], plans: Mapping[str, Any]) -> None:
    """`plans`: the shipped recipes as they are now; rows of other recipes, or of earlier versions, are left out.

    The rows are written beside the page: `bench.py page --rows docs/benchmarks.jsonl` writes it anew.
    """
    present = [row for row in rows if row["recipe"] == "original" or _is_present(row, plans)]
    trained = [row for row in present if row["kind"] == "cifar10"]
    groups = dict.fromkeys((row["weights"], row["depth"], row["calibration"]) for row in trained)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for group in sorted(groups, key=lambda g: (g[0] != "original", g[1], -g[2])):
        own = [r for r in trained if (r["weights"], r["depth"], r["calibration"]) == group]
        parts.append("\n".join(_section(own, path)))
    parts.append("\n".join(_zoo([row for row in present if row["kind"] == "torchvision"])))
    parts.append("\n".join(_commands(plans)))
    path.write_text("\n".join(part for part in parts if part).rstrip() + "\n")
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in present))


def _is_present(row: Row, plans: Mapping[str, Any]) -> bool:
    plan = plans.get(row["recipe"])
    return plan is not None and plan.hash.startswith(row["plan"])


def _section(rows: Sequence[Row], path: Path) -> Iterator[str]:
    first = rows[0]
    depth, weights, calibration = first["depth"], first["weights"], first["calibration"]
    whole = next((row for row in rows if row["recipe"] == "original"), None)
    kind = "lossless" if weights == "original" else "JPEG-decoded"
    yield f"## ResNet-{depth}, {(whole or first).get('images', 0):,} {kind} test images of CIFAR-10\n"
    command = "make bench BENCH=quick" if calibration == QUICK else "make bench"
    yield f"`{command}`, {calibration:,} images without labels calibrate, weights `resnet{depth}_{weights}`.\n"
    yield from _table(COLUMNS, [_cells(row, whole) for row in _by_accuracy(rows)])
    if whole and len(rows) > 1:
        plot = path.with_name(f"{path.stem}_{depth}_{weights}_{calibration}.png")
        _plot([row for row in rows if "failure" not in row], whole, plot, f"ResNet-{depth}, {kind}")
        yield f"\n![accuracy against MACs, bytes and latency]({plot.name})"
    yield ""


def _by_accuracy(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["recipe"] != "original", -row.get("accuracy", 0)))


def _cells(row: Row, whole: Row | None) -> list[str]:
    name = row["recipe"] if row["recipe"] == "original" else f"`{row['recipe']}`"
    if "failure" in row:
        return [name, f"failed: {row['failure']}", *[""] * (len(COLUMNS) - 2)]
    one, many = row["latency"]["1"], row["latency"]["32"]
    return [
        name,
        f"{row['accuracy']:.2f}",
        _share(row, whole, "macs"),
        _share(row, whole, "onnx"),
        _share(row, whole, "pack"),
        f"{one['ms']:.2f}",
        _faster(one),
        _faster(many),
        f"{row['parity']:.0e}{'' if row['parity_holds'] else ' BROKEN'}",
        f"{row['seconds']:.0f}",
    ]


def _share(row: Row, whole: Row | None, key: str) -> str:
    share = f" ({row[key] / whole[key]:.3f})" if whole and row is not whole else ""
    return f"{row[key]:,}{share}"


def _faster(found: Row) -> str:
    low, high = found["quartiles"]
    return f"{found['faster']:.2f}× ({low:.2f}–{high:.2f})"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for cells in lines:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _zoo(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## Families of torchvision at 224×224\n"
    yield "`make bench BENCH=torchvision`: random weights, 8 random images calibrate. Share of the MACs left, how much"
    yield "faster in ONNX Runtime (one thread, batch of 1), `=` where the file keeps its bound on parity, `≠` else.\n"
    recipes = sorted({row["recipe"] for row in rows})
    found = {(row["model"], row["recipe"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [[m, *(_in_brief(found.get((m, recipe))) for recipe in recipes)] for m in models]
    yield from _table(["model", *(f"`{recipe}`" for recipe in recipes)], lines)
    yield ""


def _in_brief(row: Row | None) -> str:
    if row is None:
        return "–"
    if "failure" in row:
        return f"failed: {row['failure']}"
    return f"{row['macs']:.2f}, {row['latency']['1']['faster']:.2f}× {'=' if row['parity_holds'] else '≠'}"


def _commands(plans: Mapping[str, Any]) -> Iterator[str]:
    yield "## The recipes\n"
    yield "Each row is what `make bench` does for every recipe; alone, from the folder with the network's module:\n"
    yield "```sh"
    yield "surgery run RECIPE --model resnet_cifar:resnet56 --input 1x3x32x32 \\"
    yield '    --data "cifar10:PATH?calibration=1024&batch=128" --out runs/RECIPE'
    yield "```\n"
    for name, plan in sorted(plans.items()):
        yield f"- `{name}`: {plan.recipe.description}"


def _plot(rows: Sequence[Row], whole: Row, path: Path, title: str) -> None:
    from matplotlib import pyplot

    axes_of = {
        "share of the MACs": lambda row: row["macs"] / whole["macs"],
        "share of the ONNX bytes": lambda row: row["onnx"] / whole["onnx"],
        "share of the pack bytes": lambda row: row["pack"] / whole["pack"],
        "share of the time, batch of 1": lambda row: 1 / row["latency"]["1"]["faster"],
    }
    figure, axes = pyplot.subplots(1, len(axes_of), figsize=(18, 4.2), sharey=True)
    colours = pyplot.get_cmap("tab20")
    for axis, (label, place) in zip(axes, axes_of.items(), strict=True):
        axis.axhline(whole["accuracy"], color="grey", linewidth=0.8)
        axis.axvline(1, color="grey", linewidth=0.8)
        for number, row in enumerate(sorted(rows, key=lambda r: r["recipe"])):
            axis.plot(place(row), row["accuracy"], "o", color=colours(number), label=row["recipe"])
        axis.set(xlabel=label, xlim=(0, None))
    axes[0].set(ylabel="top-1, %", title=title)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
