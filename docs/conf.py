"""How the documentation site is made: ``python -m sphinx -W --keep-going docs docs/_build/html``.

It needs the extra ``docs``, and no network. Pages are Markdown; the reference comes from the
docstrings; the notebooks are run. References to other projects are not links, since their lists of
names would have to be fetched.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
os.environ.setdefault("KERAS_BACKEND", "torch")  # before actreg_dispatch.keras is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # or small products wait for threads,
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # which spin
os.environ["PYTHONPATH"] = os.pathsep.join(  # of the notebooks
    filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
)

from sphinx.application import Sphinx  # noqa: E402

import actreg_dispatch  # noqa: E402

project = "actreg_dispatch"
author = "the authors of actreg_dispatch"
copyright = author  # noqa: A001
version = release = actreg_dispatch.__version__

extensions = [
    "commands",
    "house",
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# The reference.
autodoc_default_options = {"member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings say it, in words
numpydoc_show_class_members = False
nitpicky = True  # a reference that leads nowhere is an error,
nitpick_ignore_regex = [  # but to other projects
    (r"py:.*", r"(cupy|dask|jax|keras|numpy|torch)\..*"),
    (r"py:.*", r"sum|[A-Z]\w+Error"),  # and to Python
]
PROOFS = ("actreg_dispatch.sums.certified", "actreg_dispatch.backends.numba.exact")

# The pages.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True

# What it looks like.
html_theme = "pydata_sphinx_theme"
html_title = f"actreg_dispatch {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": project},
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "show_toc_level": 2,
}


def copy_notebooks(app: Sphinx) -> None:
    """Copy the notebooks next to the pages, since Sphinx reads one folder only."""
    there = HERE / "notebooks"
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    for path in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy2(path, there)


def link_within(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links to files of the repository lead to the pages made of them."""
    for file, page in (("../notebooks/", "notebooks/"), ("../CONTRIBUTING.md", "contributing.md")):
        source[0] = source[0].replace(f"]({file}", f"]({page}")


def mend_docstring(
    app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Let bars of magnitudes be bars, and headings of modules no sections of the page."""
    text = re.sub(
        r"``.*?``|(?<!\\)\|(x)\|",
        lambda found: rf"\|{found[1]}\|" if found[1] else found[0],
        "\n".join(lines),
        flags=re.DOTALL,
    )
    if what == "module":
        text = re.sub(r"^(\w+)\n-+$", r".. rubric:: \1\n", text, flags=re.MULTILINE)
    if name in PROOFS:  # whose functions are not in the reference
        text = re.sub(r":\w+:`~?([\w.]+)`", r"``\1``", text)
    lines[:] = text.split("\n")


def find_documented(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Let a reference reach a class where it is documented, wherever it is defined.

    The docstrings name ``ActivityRegularization.apply`` or a class by its module; the reference
    has the names that users import.
    """
    if node.get("refdomain") != "py":
        return None
    domain, parts = env.get_domain("py"), node["reftarget"].split(".")
    for start in range(len(parts)):
        ending = "." + ".".join(parts[start:])
        found = [name for name in domain.objects if f".{name}".endswith(ending)]
        if found and (start == 0 or parts[0] == project):
            node["reftarget"] = min(found, key=len)
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", node["reftarget"], node, contnode
            )
    return None


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", link_within)
    app.connect("missing-reference", find_documented)
    app.connect("autodoc-process-docstring", mend_docstring, priority=100)  # before numpydoc
