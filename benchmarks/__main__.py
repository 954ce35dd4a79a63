"""The command line: ``python -m benchmarks --help``."""

from __future__ import annotations

import sys


def main() -> int:
    """A GPU machine may have torch and Triton alone: its commands need neither typer nor rich."""
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks.gpu import commands

        return commands.main(sys.argv[2:])
    from benchmarks.commands import app

    return app()


if __name__ == "__main__":
    sys.exit(main())
