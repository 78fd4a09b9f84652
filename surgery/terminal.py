"""Tables and progress bars on a terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .context import silent

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from .context import Progress
    from .report import Table

SECONDS_A_LINE = 10
FILE_WIDTH = 160
"""Of tables where there is no terminal."""
KEPT_WHOLE = 24
"""Characters up to which the cells of a column are not broken; the others get as many."""
GAP = 2


def print_result(value: Any, tables: Sequence[Table], as_json: bool) -> None:
    """JSON for machines, tables for people."""
    if as_json:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    known = console.is_terminal or "COLUMNS" in os.environ
    for table in tables:
        console.print(table.title, style="italic", markup=False, highlight=False)
        if table.rows:
            drawn, least = _drawn(table)
            Console(width=max(console.width if known else FILE_WIDTH, least)).print(drawn)
        console.print()


def _drawn(table: Table) -> tuple[RichTable, int]:
    """`table`, and the characters that it needs in a line; columns of numbers and names are not broken."""
    from rich import box
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    least = 0
    for column, cells in zip(table.columns, zip(*table.rows, strict=True), strict=True):
        longest = max(map(len, (column, *cells)))
        drawn.add_column(column, overflow="fold", no_wrap=longest <= KEPT_WHOLE)
        least += min(longest, KEPT_WHOLE) + GAP
    for row in table.rows:
        drawn.add_row(*row)
    return drawn, least


def range_in_words(option: dict[str, Any]) -> str:
    """Type and limits of an option from its JSON Schema."""
    kinds = [o.get("type", "") for o in option.get("anyOf", [option])]
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {o[key]:g}" for o in option.get("anyOf", [option]) for key, sign in limits.items() if key in o]
    return " ".join([" or ".join(kinds), *found, *map(str, option.get("enum", []))])


@contextmanager
def progress_shown(quiet: bool) -> Iterator[Progress]:
    """On stderr: a bar per kind of work where that is a terminal, else lines."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield silent if quiet else _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=max(total, 1))
            bar.update(tasks[what], completed=done, total=max(total, 1))

        yield progress


def _lines() -> Progress:
    """For log files: a line when other work begins, and one every `SECONDS_A_LINE`."""
    start = time.monotonic()
    last: tuple[str, float] = "", start

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if what != last[0] or now - last[1] >= SECONDS_A_LINE:
            last = what, now
            count = f" {done}/{total}" if total > 1 else ""
            click.echo(f"{now - start:7.1f} s  {what}{count}", err=True)

    return progress
