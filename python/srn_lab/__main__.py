"""``python -m srn_lab``."""

from srn_lab.cli.app import app

if __name__ == "__main__":
    app(prog_name="srn_lab")
