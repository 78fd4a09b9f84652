"""One session of ONNX Runtime in a process of its own, without torch; `session_process` starts it as a script.

    argument   {"path": …, "providers": [["CPUExecutionProvider", {}]], "threads": null}
    stdout     a message on what was loaded; then, for each message of inputs on stdin, one of outputs

A message: its length in 8 bytes, then an `.npz` of arrays, without pickle; `error` stands for what was raised.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

Arrays = dict[str, Any]


def send(stream: IO[bytes], arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **{f"={name}": array for name, array in arrays.items()})
    stream.write(buffer.tell().to_bytes(8, "little"))
    stream.write(buffer.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> Arrays:
    """Raises EOFError where the other side is gone."""
    size = int.from_bytes(stream.read(8), "little")
    if not size:
        raise EOFError
    with np.load(io.BytesIO(stream.read(size)), allow_pickle=False) as file:
        return {name[1:]: file[name] for name in file.files}


def options_of(threads: int | None) -> Any:
    """Errors alone are logged; `threads` per operator, None = as many as the runtime takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    return options


def _serve(wanted: Mapping[str, Any], stream: IO[bytes], answers: IO[bytes]) -> None:
    import onnxruntime

    providers = [(name, dict(details)) for name, details in wanted["providers"]]
    options = options_of(wanted["threads"])
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # no more than they take
    session = onnxruntime.InferenceSession(wanted["path"], options, providers=providers)
    sides = {"inputs": session.get_inputs(), "outputs": session.get_outputs()}
    about: Any = {side: [[v.name, v.type, v.shape] for v in values] for side, values in sides.items()}
    send(answers, {"about": json.dumps(about | {"providers": session.get_providers()})})
    while True:
        try:
            feed = receive(stream)
        except EOFError:
            return
        try:
            outputs = session.run(None, feed)
        except Exception as error:  # ONNX Runtime's classes derive from Exception alone
            send(answers, _failure(error))
        else:
            send(answers, {str(i): output for i, output in enumerate(outputs)})


def _failure(error: Exception) -> Arrays:
    return {"error": json.dumps([type(error).__name__, str(error)])}


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints no answer
    try:
        _serve(json.loads(sys.argv[1]), sys.stdin.buffer, answers)
    except Exception as error:
        send(answers, _failure(error))


if __name__ == "__main__":
    main()
