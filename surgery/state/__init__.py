"""A captured model on disk, exactly and without pickle: what a run resumes from, and what a pack or run folder shows.

    graph.json            modules by class and arguments, tensors by name, nodes, structure of inputs and outputs
    weights.safetensors   every parameter and buffer once; tied ones are named in graph.json
    inputs.safetensors    the example inputs

Names, order, ties, training flags, strides and the names already used up come back as they were, so a resumed run goes
on exactly like one that was never stopped. What is read is plain data: it can name operators and layer classes of a
list (`Known`), nothing that is imported or run.
"""

from .allowed import Known
from .files import digest
from .read import Containers, containers_of, load_state
from .write import save_state

__all__ = ["Containers", "Known", "containers_of", "digest", "load_state", "save_state"]
