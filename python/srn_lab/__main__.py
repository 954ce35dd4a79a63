"""``python -m srn_lab``."""

from srn_lab.cli import app

if __name__ == "__main__":
    app(prog_name="srn_lab")
