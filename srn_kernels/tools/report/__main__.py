"""``python -m srn_kernels.tools.report checkpoint.pt``: the table of a checkpoint."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from srn_kernels.tools.report.checkpoint import load_state, report_state


def _finite(value: Any) -> Any:
    """JSON has no infinity and no nan."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m srn_kernels.tools.report",
        description="One row for each matrix of a checkpoint, whatever form of spectral norm it "
        "has, without the model's code.",
    )
    parser.add_argument("checkpoint", type=Path, help="a state dict: .pt, .pth or .safetensors")
    parser.add_argument(
        "--rank-ratio", type=float, default=1.0, help="in (0, 1]: the target to compare with"
    )
    parser.add_argument("--json", action="store_true", help="numbers for programs, not a table")
    options = parser.parse_args(arguments)
    try:
        found = report_state(load_state(options.checkpoint), rank_ratio=options.rank_ratio)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_finite(found.to_dict()), indent=1) if options.json else found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
