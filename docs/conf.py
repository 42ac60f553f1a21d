"""The site of the documentation, which `make docs` builds.

The source folder is the repository itself, so that a link of a page means the same file here, on a
code host and in an editor. Notebooks are executed while the site is built; NOTEBOOKS=off leaves
that out, and those that need an extra that is not installed are shown as they are stored.
"""

import ast
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import re
import textwrap
import tokenize
from pathlib import Path

import singlequant

ROOT = Path(__file__).resolve().parents[1]

project = "singlequant"
copyright = "the authors of singlequant"
release = version = singlequant.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/api/*.md",
                    "notebooks/*.ipynb", "singlequant/data/stdlib-llama/README.md"]
exclude_patterns = [".venv*", "build", "csrc", "tests", "tools", "benchmarks/results"]

# ---- pages ----------------------------------------------------------------------------------

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
myst_links_external_new_tab = True
suppress_warnings = ["myst.header"]  # a page may begin below the first level

# ---- notebooks ------------------------------------------------------------------------------


def lacks_extra(path: Path) -> bool:
    """Whether a notebook names a package that is not installed here."""
    needs = json.loads(path.read_text())["metadata"].get("singlequant", {}).get("needs", {})
    return any(importlib.util.find_spec(name) is None for name in needs)


nb_execution_mode = "off" if os.environ.get("NOTEBOOKS") == "off" else "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_excludepatterns = [f"notebooks/{path.name}"
                                for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
                                if lacks_extra(path)]
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
for path in nb_execution_excludepatterns:
    print(f"SKIPPED: {path} is not executed, as a package it needs is not installed")

# ---- the reference --------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
# Shown without what they need where it is not installed.
autodoc_mock_imports = [name for name in ("torch", "transformers")
                        if importlib.util.find_spec(name) is None]
add_module_names = False
default_role = "py:obj"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

ARRAY = re.compile(r"~?numpy\.ndarray\[tuple\[~?typing\.Any, \.\.\.\], "
                   r"~?numpy\.dtype\[~?(?:numpy|typing)\.(\w+)\]\]")
# Docstrings are plain text with `names`: what reStructuredText reads as markup is escaped.
MARKUP = re.compile(r"(`[^`]+`)|([*|\\]|_\b)")


def escape(line: str) -> str:
    """The line with its markup escaped, all but names in backquotes."""
    return MARKUP.sub(lambda m: m[1] or "\\" + m[2], line)


def plain_text(app, what, name, obj, options, lines) -> None:
    """Escape a docstring's lines in place, and describe the fields of a dataclass."""
    lines[:] = map(escape, lines)
    if what == "class" and dataclasses.is_dataclass(obj):
        lines += ["", *(f":ivar {field}: {escape(text)}" for field, text in comments(obj).items())]


def comments(cls: type) -> dict[str, str]:
    """What the comments behind the fields of a dataclass say, by field."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = {token.start[0]: token.string.rpartition("# ")[2] for token in tokens
             if token.type == tokenize.COMMENT}
    body = ast.parse(source).body[0].body
    return {node.target.id: found[node.end_lineno] for node in body
            if isinstance(node, ast.AnnAssign) and not found.get(
                node.end_lineno, "type: ").startswith("type: ")}


def short_types(app, what, name, obj, options, signature, returned):
    """The signature with NumPy's types as the source spells them."""
    return tuple(text and ARRAY.sub(r"NDArray[\1]", text) for text in (signature, returned))


def setup(app) -> None:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-process-signature", short_types)


# ---- looks ----------------------------------------------------------------------------------

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_title = "singlequant"
html_copy_source = False
html_show_sourcelink = False
