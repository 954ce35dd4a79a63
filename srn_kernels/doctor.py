"""``python -m srn_kernels.doctor MODULE:FUNCTION``: what a model would gain, the lines to add."""

from srn_kernels.tools.doctor.command import main

if __name__ == "__main__":
    raise SystemExit(main())
