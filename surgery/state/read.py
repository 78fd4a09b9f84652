"""The files of a state back to a captured model, which nests its arguments and outputs as the model at hand does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..captured import CallCodeGen, CapturedModel
from ..errors import RunError
from ..graph import propagate
from ..inputs import Inputs
from ..torch_private import TreeInfo, TreeSpec, codegen_of, tree_leaves, tree_unflatten
from ..tracing import first_line
from .allowed import Known
from .build import build_model, place
from .files import read_tensors
from .form import GRAPH, INPUTS, WEIGHTS, read_document
from .structure import has_classes, plain

REMEDY = "run again without resuming"

Containers = Callable[[], tuple[TreeSpec, TreeSpec]]


def load_state(folder: str | Path, known: Known | None = None, containers: Containers | None = None) -> CapturedModel:
    """The model that `save_state` wrote, on the CPU, with shapes noted on its nodes.

    `known`: what it may name. `containers`: how the model at hand nests its arguments and outputs, asked for where it
    may do so in classes of its own; without it their place is taken by dicts and tuples.

    Raises:
        RunError: a file is missing or damaged, names an operator or class that is not known here, or does not fit the
            other files; it names the file and the place.
    """
    source = Path(folder)
    with _damage(source / GRAPH):
        document = read_document((source / GRAPH).read_bytes())
    with _damage(source / WEIGHTS):
        tensors = read_tensors(source / WEIGHTS)
    with _damage(source / INPUTS):
        example = read_tensors(source / INPUTS)
    with _damage(source / GRAPH):
        model = build_model(document, tensors, known or Known(), example)
        if containers and has_classes([document.inputs, document.outputs]):
            use_containers(model, *containers())
        with place("running it on the example inputs"):
            propagate(model.eval(), model.meta["capture"].inputs)
    for record in document.modules:
        model.get_submodule(record.name).training = record.training
        if record.cls is not None:
            model.get_submodule(record.name).train(record.training)
    return model


def containers_of(model: CapturedModel) -> tuple[TreeSpec, TreeSpec]:
    """How its arguments and outputs are nested."""
    info = codegen_of(model.graph).pytree_info
    return info.in_spec, info.out_spec


def use_containers(model: CapturedModel, inputs: TreeSpec, outputs: TreeSpec) -> None:
    """Nest arguments and outputs in these classes, which hold the same parts.

    Raises:
        ValueError: they do not.
    """
    if (plain(inputs), plain(outputs)) != tuple(map(plain, containers_of(model))):
        raise ValueError("the model's arguments or outputs are not nested as those of the model at hand")
    info = model.meta["capture"]
    leaves = tree_leaves((info.inputs.args, info.inputs.kwargs))
    args, kwargs = tree_unflatten(leaves, inputs)
    model.meta["capture"] = replace(info, inputs=Inputs(args, kwargs))
    names = codegen_of(model.graph).pytree_info.orig_args
    model.graph.set_codegen(CallCodeGen(TreeInfo(names, inputs, outputs)))
    model.recompile()


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"there is no {file.name}", at=str(file), fix=REMEDY) from error
    except Exception as error:
        raise RunError(f"the state is damaged: {first_line(error)}", at=str(file), fix=REMEDY) from error
