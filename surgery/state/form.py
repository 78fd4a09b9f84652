"""The form of `graph.json`, the same for writing and for reading; every field is checked strictly."""

from __future__ import annotations

import json
import keyword
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import RunError

GRAPH, WEIGHTS, INPUTS = "graph.json", "weights.safetensors", "inputs.safetensors"
REMEDY = "remove this folder and resume: the step runs again"

Op = Literal["placeholder", "get_attr", "call_function", "call_module", "output"]


def _identifier(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise ValueError(f"{text!r} is no name of a node or argument")
    return text


def _path(text: str) -> str:
    # fx writes these names into the source code that it runs
    if not re.fullmatch(r"[^\"'\\{}\x00-\x1f\x7f]*", text):
        raise ValueError(f"{text!r} is no name of a module or tensor")
    return text


Identifier = Annotated[str, AfterValidator(_identifier)]
DottedName = Annotated[str, AfterValidator(_path)]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class ModuleRecord(Record):
    """A container, a layer (`class` and `arguments`), or another name of an earlier one (`same_as`)."""

    name: DottedName
    training: bool
    cls: str | None = Field(None, alias="class")
    arguments: dict[str, Any] = {}
    same_as: DottedName | None = None


class TensorRecord(Record):
    """A parameter or buffer. `strides` where the memory is not in row-major order; `same_as` for a tied one."""

    name: DottedName
    shape: list[int]
    dtype: str
    kind: Literal["parameter", "buffer"]
    requires_grad: bool = True
    persistent: bool = True
    strides: list[int] | None = None
    same_as: DottedName | None = None


class NodeRecord(Record):
    name: Identifier
    op: Op
    target: DottedName
    args: list[Any] = []
    kwargs: dict[Identifier, Any] = {}
    meta: dict[str, Any] = {}


class Capture(Record):
    dynamic_batch: bool
    notes: list[str]
    error: Any


class Example(Record):
    """The example inputs flattened: structure, and each leaf that is no tensor."""

    spec: str
    leaves: list[Any]


class Signature(Record):
    """Argument names and the structures of inputs and outputs."""

    names: list[Identifier]
    inputs: str
    outputs: str


class UsedNames(Record):
    """Names the graph must not give again, and how far it counted for each stem."""

    gone: list[str]
    counts: dict[str, int]


class Document(Record):
    format: Literal["surgery-state"]
    version: Literal[1]
    capture: Capture
    meta: dict[str, Any]
    inputs: Example
    signature: Signature
    used_names: UsedNames
    modules: list[ModuleRecord]
    tensors: list[TensorRecord]
    nodes: list[NodeRecord]

    def to_bytes(self) -> bytes:
        data = self.model_dump(by_alias=True, exclude_unset=True)
        return (json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_document(path: Path) -> Document:
    """The checked content of a `graph.json`.

    Raises:
        RunError: the file is missing, no JSON, or not of this form; it names the field.
    """
    try:
        return Document.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise RunError(f"there is no {path.name}", at=str(path), fix=REMEDY) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RunError(f"{place}: {first['msg']}", at=str(path), fix=REMEDY) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"the file is no JSON: {error}", at=str(path), fix=REMEDY) from error
