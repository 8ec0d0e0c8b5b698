"""How Sphinx builds these pages: `sphinx-build -W docs docs/_build`.

Sphinx with MyST: Markdown as in the README, links that the build checks, and the reference out of the docstrings
themselves; its own theme, alabaster, brings nothing more to install.
"""

import longattn

project = "longattn"
version = release = longattn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "alabaster"
html_theme_options = {"description": "Structure surgery for language models", "page_width": "1280px"}
html_sidebars = {"**": ["about.html", "searchbox.html", "navigation.html"]}
html_show_copyright = False
html_show_sourcelink = False

myst_heading_anchors = 3
napoleon_custom_sections = [("Reference", "References")]
autodoc_member_order = "bysource"
default_role = "literal"  # what docstrings set in single backticks
python_maximum_signature_line_length = 88
autodoc_typehints = "none"  # the docstrings give shapes, dtypes and units, which types do not
