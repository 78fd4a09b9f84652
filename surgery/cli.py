"""The command line. Exit codes: 0 done, 1 a bug of ours, 2 wrong use or an error with its remedy, 3 the budget is
broken.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import BudgetError, SurgeryError
from .paths import path_from
from .process import memory_told
from .terminal import print_result, progress_shown, range_in_words

if TYPE_CHECKING:
    from .pipeline import Operation

SPINS = "1000"
"""Rounds that OpenMP's threads wait for each other awake, before PyTorch sets it to hundreds of thousands: where others
use the cores too, these rounds are most of the time."""


class _PathType(click.ParamType):  # type: ignore[type-arg]
    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return path_from(value, param.human_readable_name if param else "the path")


PATH = _PathType()

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")

data_option = click.option(
    "--data",
    "data_name",
    metavar="NAME",
    help="digits, cifar10:PATH, imagefolder:PATH, or module:function that gives batches or surgery.Data.",
)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that name a model, its weights and its example inputs."""
    options = (
        click.option(
            "--model",
            "model_name",
            required=True,
            metavar="MODULE:FACTORY",
            help="Called without arguments; gives the model, or (model, example inputs).",
        ),
        click.option("--weights", type=PATH, help=".safetensors, or a state dict saved by torch."),
        click.option(
            "--input",
            "shapes",
            multiple=True,
            metavar="[NAME=]SHAPE[:DTYPE][<LIMIT]",
            help="Example input such as 1x3x32x32 or ids=1x16:int64<1000 (integers below it); once per input.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="surgery")
def cli() -> None:
    """Surgery on trained PyTorch models.

    Exit codes: 0 done, 2 wrong use or an error with its remedy, 3 the result breaks the recipe's budget (files are
    kept), 130 interrupted, 1 anything else.
    """


@cli.command()
@click.argument("recipe")
@model_options
@data_option
@click.option("--out", type=PATH, required=True, help="Folder for model, report and finished steps.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change the recipe: passes.1.ratio=0.3 (index or name of the pass), budget.sqnr_db=20, on_break=undo.",
)
@click.option("--resume", is_flag=True, help="Take over the finished steps in the folder.")
@click.option("--device", default="cpu", show_default=True, help="Where heavy work may run.")
@as_json
def run(
    recipe: str,
    model_name: str,
    weights: Path | None,
    shapes: Sequence[str],
    data_name: str | None,
    out: Path,
    changes: Sequence[str],
    resume: bool,
    device: str,
    as_json: bool,
) -> None:
    """Apply RECIPE (a name or a .yaml file) to a model and prove the result."""
    from .pipeline import operate
    from .recipe import overrides_from

    overrides = overrides_from(changes)
    model, inputs = _model(model_name, weights, shapes)
    data = _data(data_name, inputs)
    with progress_shown(quiet=as_json) as progress:
        operation = operate(
            model,
            inputs,
            recipe,
            overrides=overrides,
            data=data,
            out=out,
            resume=resume,
            device=device,
            progress=progress,
        )
    _show_operation(operation, as_json)


@cli.command()
@model_options
@click.option("--pass", "pass_names", multiple=True, help="Only these passes.")
@data_option
@as_json
def inspect(
    model_name: str,
    weights: Path | None,
    shapes: Sequence[str],
    pass_names: Sequence[str],
    data_name: str | None,
    as_json: bool,
) -> None:
    """Layers of a model with parameters and MACs, and what each pass would touch or skip; with data, also those passes
    that need some."""
    from .inspection import inspect as look
    from .registry import Registry

    model, inputs = _model(model_name, weights, shapes)
    with progress_shown(quiet=as_json) as progress:
        findings = look(model, inputs, Registry.load(), pass_names, progress, _data(data_name, inputs))
    print_result(findings.to_dict(), findings.tables(), as_json)


@cli.command()
@as_json
def passes(as_json: bool) -> None:
    """Installed passes."""
    from .registry import Registry
    from .report import Table

    registry = Registry.load()
    rows = tuple(
        (name, "exact" if cls.exact else "", cls.summary(), registry.provider(name))
        for name, cls in registry.passes.items()
    )
    keys = ("pass", "exactness", "summary", "plugin")
    print_result([dict(zip(keys, row, strict=True)) for row in rows], [Table("Passes", keys, rows)], as_json)


@cli.command()
@as_json
def criteria(as_json: bool) -> None:
    """Installed criteria of importance, to choose channels by."""
    from .registry import Registry
    from .report import Table

    needs = {"needs_calibration": "calibration data", "needs_training": "labelled data"}
    rows = tuple(
        (name, ", ".join(text for flag, text in needs.items() if getattr(cls, flag)), cls.summary())
        for name, cls in Registry.load().criteria.items()
    )
    keys = ("criterion", "needs", "summary")
    print_result([dict(zip(keys, row, strict=True)) for row in rows], [Table("Criteria", keys, rows)], as_json)


@cli.command()
@as_json
def recipes(as_json: bool) -> None:
    """Installed recipes."""
    from .recipe import resolve
    from .registry import Registry
    from .report import Table

    registry = Registry.load()
    rows = tuple((name, resolve(name, registry).recipe.description) for name in registry.recipes)
    print_result(
        [{"recipe": n, "description": d} for n, d in rows],
        [Table("Recipes", ("recipe", "when to use it"), rows)],
        as_json,
    )


@cli.command()
@click.argument("name", metavar="PASS")
@as_json
def show(name: str, as_json: bool) -> None:
    """Options of a pass with defaults, range and meaning, and its source in the literature."""
    from .recipe import adapter
    from .registry import Registry
    from .report import Table

    cls = Registry.load().find_pass(name)
    schema = adapter(cls).json_schema()
    rows = tuple(
        (key, json.dumps(option.get("default")), range_in_words(option), option.get("description", ""))
        for key, option in schema["properties"].items()
    )
    strength = list(cls.strength)
    order = {trait: sorted(getattr(cls, trait)) for trait in _ORDER}
    if not as_json:
        softened = ", ".join(strength) or "none, so that it cannot be softened"
        click.echo(f"{name}\n\n{cleandoc(cls.__doc__ or '')}\n\nStrength (`on_break: soften`): {softened}")
        for what, traits in order.items():
            if traits:
                click.echo(f"{_ORDER[what]}: {', '.join(traits)}")
        click.echo()
    print_result(
        {"pass": name, "doc": cls.__doc__, "strength": strength, "order": order, "options": schema},
        [Table("Options", ("option", "default", "type", "meaning"), rows)],
        as_json,
    )


@cli.command()
@click.argument("reference", metavar="A", type=PATH)
@click.argument("candidate", metavar="B", type=PATH)
@click.option(
    "--input",
    "shapes",
    multiple=True,
    metavar="[NAME=]SHAPE[:DTYPE]",
    help="Random inputs of this shape; once per input.",
)
@click.option(
    "--data",
    "data_name",
    metavar="NAME",
    help="As in run, instead of random inputs; images are then of the size of --input.",
)
@click.option("--trust", is_flag=True, help="Run the source of run folders and model.py: Python that you would import.")
@as_json
def verify(
    reference: Path, candidate: Path, shapes: Sequence[str], data_name: str | None, trust: bool, as_json: bool
) -> None:
    """Compare two models: run folders, model.py, .surgery or .onnx files. A is the reference.

    Models are built from the graph that lies beside their source or in the pack: nothing of the files is run, unless
    --trust says so.
    """
    from .data import Data
    from .report import proof
    from .specs import inputs_from
    from .verification import verify as compare

    if not (shapes or data_name):
        raise SurgeryError("nothing to compare on", fix="give --input SHAPE or --data NAME")
    inputs = inputs_from(shapes) if shapes else None
    data = Data.of(_data(data_name, inputs) if data_name else [inputs])
    if not (data_name or as_json):
        click.echo("Compared on random numbers, floats from N(0, 1): what a model does on data, --data tells.\n")
    batches = data.calibration if data.evaluation is None else data.evaluation
    labelled = data.evaluation is not None
    verification = compare(reference, candidate, batches, labelled=labelled, metric=data.metric, trust=trust)
    print_result(verification.to_dict(), [proof(verification.to_dict())], as_json)
    if not verification.passed:
        raise BudgetError("; ".join(verification.shortfalls))


@cli.command()
@click.argument("source", type=PATH)
@click.option("--out", type=PATH, help="File to write; by default model.surgery beside the source.")
@click.option("--codec", default="huffman", show_default=True, help="Entropy coder.")
@as_json
def pack(source: Path, out: Path | None, codec: str, as_json: bool) -> None:
    """Write SOURCE (a run folder, or a model.py with its graph and weights beside it) as one lossless file to ship."""
    from .packing.listing import listing
    from .packing.reading import Pack
    from .packing.writing import pack as write

    path = write(source, out, codec=codec)
    with Pack(path) as content:
        found = listing(content)
    print_result(found.to_dict(), [found.total()], as_json)
    if not as_json:
        click.echo(f"\nFile: {path}")


@cli.command()
@click.argument("file", type=PATH)
@click.argument("folder", type=PATH, required=False)
@click.option("--list", "only_list", is_flag=True, help="Print what is in the pack, and write nothing.")
@click.option(
    "--limit-bytes", type=int, help="What the content may take in memory; by default 1 GiB or 256 times the file."
)
@as_json
def unpack(file: Path, folder: Path | None, only_list: bool, limit_bytes: int | None, as_json: bool) -> None:
    """Write model.py, its graph, weights and recipe from the pack FILE into FOLDER; or list what is in it.

    Nothing of the file is run: model.py is written anew from the graph.
    """
    from .packing.listing import listing
    from .packing.reading import Pack
    from .packing.unpacking import unpack as write

    if only_list == (folder is not None):
        raise SurgeryError("nothing to do, or two things at once", fix="give either a FOLDER or --list")
    with Pack(file, limit_bytes=limit_bytes) as content:
        found = listing(content)
    files = write(file, folder, limit_bytes=limit_bytes) if folder is not None else ()
    written = {"files": [str(path) for path in files]} if folder is not None else {}
    print_result(found.to_dict() | written, [found.table()] if only_list else [], as_json)
    if files and not as_json:
        click.echo("\n".join(map(str, files)))


@cli.command()
@as_json
def codecs(as_json: bool) -> None:
    """Installed entropy coders of packs."""
    from .registry import Registry
    from .report import Table

    rows = tuple((name, cls.summary()) for name, cls in Registry.load().codecs.items())
    keys = ("codec", "summary")
    print_result([dict(zip(keys, row, strict=True)) for row in rows], [Table("Codecs", keys, rows)], as_json)


@cli.command()
@as_json
def quantizers(as_json: bool) -> None:
    """Installed quantisers to train weights through."""
    from .registry import Registry
    from .report import Table

    rows = tuple((name, cls.summary()) for name, cls in Registry.load().weight_quantizers.items())
    keys = ("quantizer", "summary")
    print_result([dict(zip(keys, row, strict=True)) for row in rows], [Table("Quantizers", keys, rows)], as_json)


@cli.command()
def schema() -> None:
    """JSON Schema of recipes, for editors."""
    from .recipe import schema as recipe_schema
    from .registry import Registry

    click.echo(json.dumps(recipe_schema(Registry.load()), indent=2))


@cli.command()
@click.option(
    "--out",
    type=PATH,
    default=Path("runs/demo"),
    show_default=True,
    help="Folder for the result; an earlier demo in it is replaced.",
)
@as_json
def demo(out: Path, as_json: bool) -> None:
    """Train a small CNN on scikit-learn's digits, operate on it, prove it, and show the result."""
    from .demo import run_demo

    with progress_shown(quiet=as_json) as progress:
        operation = run_demo(out, progress)
    _show_operation(operation, as_json)


_ORDER = {
    "gives": "Leaves the model",
    "marks": "Leaves the layers it edits",
    "clears": "Takes away",
    "refuses": "Cannot run where something is",
}
"""Traits that order passes, in words; see docs/plugins.md."""


def _model(name: str, weights: Path | None, shapes: Sequence[str]) -> tuple[Any, Any]:
    from .loading import load_weights
    from .specs import inputs_from, model_from

    model, inputs = model_from(name)
    if weights is not None:
        load_weights(model, weights)
    if shapes:
        inputs = inputs_from(shapes)
    if inputs is None:
        raise SurgeryError("no example input", fix="give --input SHAPE, or a factory that gives (model, inputs)")
    return model, inputs


def _data(name: str | None, inputs: Any = None) -> Any:
    from .datasets import data_from

    return None if name is None else data_from(name, inputs)


def _show_operation(operation: Operation, as_json: bool) -> None:
    from . import report

    summary, timings = report.summary(operation), report.timings(operation)
    shown = report.tables(summary, timings)
    print_result({**summary, "timings": timings}, [*shown[3:], shown[2], shown[0], shown[1]], as_json)
    if operation.folder and not as_json:
        click.echo(f"\nFiles: {operation.folder}")
    if not operation.passed:
        raise BudgetError("the result breaks the recipe's budget", fix="see the report; the files are kept")


def main() -> None:
    """Entry point: errors with a remedy are printed without a traceback."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        with memory_told():
            cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Finished steps of a run are kept; the same command with --resume goes on.", err=True)
        sys.exit(130)
    except SurgeryError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)
