"""A captured model on disk, exactly and without pickle: what a run resumes from.

    graph.json            modules by class and arguments, tensors by name, nodes, structure of inputs and outputs
    weights.safetensors   every parameter and buffer once; tied ones are named in graph.json
    inputs.safetensors    the example inputs

Names, order, ties, training flags, strides and the names already used up come back as they were, so a resumed run goes
on exactly like one that was never stopped. A file is checked before it is believed: it can name operators and layer
classes, nothing that runs.
"""

from .read import load_state
from .write import save_state

__all__ = ["load_state", "save_state"]
