"""The document of a captured model, the same for writing and for reading; every field is checked strictly.

It stands as `graph.json` in a state, as `model.graph.json` beside a `model.py`, and in a pack.
"""

from __future__ import annotations

import hashlib
import json
import keyword
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

GRAPH, WEIGHTS, INPUTS = FILES = ("graph.json", "weights.safetensors", "inputs.safetensors")
VERSION = 2
LONGEST_NAME, DEEPEST = 4096, 64

Op = Literal["placeholder", "get_attr", "call_function", "call_module", "output"]


def _identifier(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise ValueError(f"{text!r} is no name of a node or argument")
    return text


def _path(text: str) -> str:
    # fx writes these names into the source code that it runs, in quotes where they are no identifiers
    if len(text) > LONGEST_NAME or text.count(".") > DEEPEST:
        raise ValueError(f"{text[:40]!r}… is too long a name, or too deep")
    if any(character in '"\\' or not character.isprintable() for character in text):
        raise ValueError(f"{text!r} is no name of a module or tensor")
    return text


Identifier = Annotated[str, AfterValidator(_identifier)]
DottedName = Annotated[str, AfterValidator(_path)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class ModuleRecord(Record):
    """A container, a layer (`class` and `arguments`), or another name of an earlier one (`same_as`)."""

    name: DottedName
    training: bool = False
    cls: str | None = Field(None, alias="class")
    arguments: dict[str, Any] = {}
    same_as: DottedName | None = None


class TensorRecord(Record):
    """A parameter or buffer. `strides` where the memory is not in row-major order; `same_as` for a tied one."""

    name: DottedName
    kind: Literal["parameter", "buffer"] = "parameter"
    requires_grad: bool = True
    persistent: bool = True
    strides: list[int] | None = None
    same_as: DottedName | None = None


class NodeRecord(Record):
    """`rank`: dimensions of the result at the example, a list for a tuple of results."""

    name: Identifier
    op: Op
    target: DottedName
    args: list[Any] = []
    kwargs: dict[Identifier, Any] = {}
    path: DottedName | None = None
    """What the user calls the place, `node.meta["module_path"]`; by default "" or, of a module, the target."""
    rank: int | list[Any] | None = None


class Capture(Record):
    dynamic_batch: bool
    notes: list[str]
    error: Any


class UsedNames(Record):
    """Names the graph must not give again, and how far it counted for each stem."""

    gone: list[str]
    counts: dict[str, int]


class Document(Record):
    format: Literal["surgery-graph"]
    version: Literal[2]
    capture: Capture
    meta: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    """Lines for the docstring of the source, such as the recipe's hash."""
    source_sha256: str | None = None
    """Of the `model.py` that was written together with it."""
    names: list[Identifier]
    """Of the arguments."""
    inputs: Any
    outputs: Any
    """How they are nested, see `structure`."""
    example: list[Any]
    """Each leaf of the example inputs: {"tensor": [type, shape]}, or its value."""
    used_names: UsedNames | None = None
    modules: list[ModuleRecord]
    tensors: list[TensorRecord]
    nodes: list[NodeRecord]

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return self.model_dump(by_alias=True, exclude_defaults=True)

    def to_bytes(self) -> bytes:
        return (json.dumps(self.plain(), separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n").encode()


def with_source(document: Document, source: bytes) -> Document:
    """For a `model.py` of this content."""
    return document.model_copy(update={"source_sha256": hashlib.sha256(source).hexdigest()})


def read_document(data: bytes) -> Document:
    """The checked document.

    Raises:
        ValueError: no JSON, or not of this form; the text names the field.
    """
    try:
        return Document.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from error
