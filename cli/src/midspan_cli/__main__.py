"""``python -m midspan_cli``: the same as the ``midspan`` command."""

from __future__ import annotations

from midspan_cli.main import main

main()
