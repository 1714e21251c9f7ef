"""The settings of the site. `python lab.py docs` builds it into docs/_build, from docstrings and without a network."""

from __future__ import annotations

import sys
from pathlib import Path

from astroid.builder import AstroidBuilder

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where docstrings.py is

project = "qftlab"
author = "qftlab contributors"
html_title = "qftlab"
html_theme = "sphinx_book_theme"
html_theme_options = {"home_page_in_toc": True, "use_download_button": False, "use_fullscreen_button": False}
extensions = ["myst_parser", "autodoc2"]
exclude_patterns = ["_build"]
myst_disable_syntax = ["html_block", "html_inline"]  # <answer> and <|im_end|> are text here

# The library is read, not imported: no torch is needed. To find attributes that are set from outside their class,
# astroid would read torch and transformers too, for minutes; there are none to document.
AstroidBuilder.delayed_assattr = lambda self, node: None
autodoc2_packages = [{"path": "../qftlab", "auto_mode": True}]
autodoc2_output_dir = "api"
autodoc2_render_plugin = "myst"
autodoc2_docstring_parser_regexes = [(r".*", "docstrings")]
autodoc2_hidden_objects = ["dunder", "private", "inherited"]
autodoc2_hidden_regexes = [r".*\.(log|logger)", r"qftlab\.__main__"]
autodoc2_class_docstring = "both"
autodoc2_index_template = None
suppress_warnings = ["autodoc2.dup_item"]  # a name given twice in one file, such as its logger
