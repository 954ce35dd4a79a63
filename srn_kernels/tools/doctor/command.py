"""The command line of the doctor."""

from __future__ import annotations

import argparse
import json
import re
import sys

from srn_kernels.tools.doctor.examine import Difference, examine
from srn_kernels.tools.doctor.factory import DoctorError, find_factory
from srn_kernels.tools.doctor.text import lines, to_dict


def shape(text: str) -> tuple[int, ...]:
    """``2x3x64x64`` or ``2,3,64,64``."""
    if not re.fullmatch(r"[1-9]\d*([x,][1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a shape, as in 2x3x64x64")
    return tuple(int(n) for n in re.split("[x,]", text))


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 where an output that should stay changes, 2 for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m srn_kernels.doctor",
        description="Which layers of a model srn_kernels would take and why not the others, "
        "whether its output stays, what a training round takes before and after, the lines to add.",
    )
    parser.add_argument(
        "target",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns the model, or (model, inputs)",
    )
    parser.add_argument(
        "--input-shape", type=shape, metavar="BxCxHxW", help="of one tensor of normal numbers"
    )
    parser.add_argument("--rank-ratio", type=float, default=1.0, help="in (0, 1] (1)")
    parser.add_argument("--device", default="cpu", help="where outputs and rounds are tried (cpu)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the timing, about (10)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        found = examine(
            find_factory(options.target),
            input_shape=options.input_shape,
            rank_ratio=options.rank_ratio,
            device=options.device,
            seconds=options.seconds,
        )
    except (DoctorError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(to_dict(found, options.rank_ratio), indent=1))
    else:
        print("\n".join(lines(found, options.rank_ratio, options.device)))
    return int(isinstance(found.output, Difference) and not found.output.stays)
