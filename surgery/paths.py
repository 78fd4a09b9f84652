"""A path as the user gave it, tried before anything is looked for there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import PathError


def path_from(given: Any, what: str) -> Path:
    """`given` as a path, with `~` as the home folder. `what` names it in errors, such as "out".

    Raises:
        PathError: it is empty, no path, holds what no name may hold, is too long, or lies below a file or where nobody
            may look.
    """
    try:
        text = os.fspath(given)
        if not isinstance(text, str) or not text:
            raise ValueError("it is empty" if text == "" else "it is no text")
        text.encode()  # libraries in other languages take no other names
        path = Path(text).expanduser()
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        shown = repr(given) if len(repr(given)) <= LONGEST else f"{repr(given)[:LONGEST]} …"
        reason = getattr(error, "strerror", None) or error
        raise PathError(f"{what} is {shown}, no usable path: {reason}", fix="give another path") from error
    return path


LONGEST = 80
"""Characters of a path that an error quotes."""
