"""The documentation site: `make docs`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE.parent)]

import srn_kernels  # noqa: E402

project = "srn_kernels"
author = "the authors of srn_kernels"
copyright = author
version = release = srn_kernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "docstrings",
    "mathml",
    "sources",
]
exclude_patterns = ["_*"]
nitpicky = True
# Names of other packages have no page here, nor has the type of what comes back as it went in.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|collections|typing|typing_extensions)\..*"),
    ("py:class", r"Tensor|Optimizer|Figure|(.*\.)?M"),
]

myst_enable_extensions = ["dollarmath", "deflist", "attrs_block"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_rtype = False
maximum_signature_line_length = 72
smartquotes = False
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"srn_kernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
linkcheck_timeout = 20
