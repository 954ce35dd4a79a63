"""The commands of ``python -m srn_lab``."""
