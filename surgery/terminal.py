"""Tables and progress bars on a terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from .context import silent

if TYPE_CHECKING:
    from .context import Progress
    from .report import Table

SECONDS_A_LINE = 10


def print_result(value: Any, tables: Sequence[Table], as_json: bool) -> None:
    """JSON for machines, tables for people."""
    if as_json:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left")
        for column in table.columns:
            drawn.add_column(column, overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


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
