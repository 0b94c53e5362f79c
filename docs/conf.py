"""Settings of Sphinx, which `make docs` builds the pages with. Warnings are errors there."""

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# detectron2 0.6 scripts functions at import.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

import contrast_d2  # noqa: E402

project = "contrast_d2"
author = copyright = "contrast_d2 contributors"
release = contrast_d2.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The pages are read from the root of the repository, since they link to the README and to results.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "results/README.md"]
exclude_patterns = [".*", "contrast_d2", "configs", "datasets", "output", "tests", "tools"]
html_theme = "furo"
html_title = "contrast_d2"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings put names and code between single backticks.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app) -> None:
    """Leaves out the generated descriptions of a NamedTuple's fields: its docstring has better."""

    def skip(app, what, name, member, is_skipped, options):
        return True if str(member.__doc__).startswith("Alias for field number") else None

    app.connect("autodoc-skip-member", skip)
