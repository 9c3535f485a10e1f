"""Sphinx: `uv run --group docs sphinx-build -W docs docs/_build`."""

from __future__ import annotations

import triojobs

project = "triojobs"
author = "the triojobs authors"
project_copyright = "the triojobs authors"
version = release = triojobs.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinxcontrib_trio"]
html_theme = "furo"
html_title = "triojobs"
exclude_patterns = ["_build", "bench"]  # a link to the plots, which README.rst shows
nitpicky = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Cancellation", "Threads", "Source"]
default_role = "py:obj"
