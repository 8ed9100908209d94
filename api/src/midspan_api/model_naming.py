"""The names under which a model is served when nobody chose any.

Knows names and paths only. The first is the name that the server was given; the
second is what people call the model: the name of its file or folder without the
storage format, or the last part of its name on the hub.
"""

from __future__ import annotations

import re
from pathlib import Path

STORAGE_FORMAT = re.compile(r"[-._](?:i?q\d\w*|b?f16|f32|fp16|fp32)$", re.IGNORECASE)
"""As files are named: ``NAME.Q4_1.gguf``, ``NAME-Q4_K_M.gguf``, ``NAME-f16.gguf``."""

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
PACKAGE_PREFIX = "pypi:"


def served_names(given: str, path: str) -> tuple[str, ...]:
    """The name as given, and the readable one where it is another.

    Args:
        given: what the server was asked to serve.
        path: the folder or file that it was loaded from.
    """
    where = Path(path)
    if where.suffix == ".gguf":
        readable = STORAGE_FORMAT.sub("", SHARD.sub("", where.stem))
    elif given.startswith(PACKAGE_PREFIX) or Path(given).exists():
        readable = where.name
    else:
        readable = given.rpartition("/")[2]
    return tuple(dict.fromkeys(name for name in (given, readable) if name))
