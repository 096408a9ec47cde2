"""What the documents show is run."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDS = {  # notebook -> what may not be installed for the tests
    "02_pytorch.ipynb": ("torch",),
    "03_dask.ipynb": ("resource",),  # of Unix
    "04_weights.ipynb": ("torch",),
}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(
            r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    )
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose)
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("block", BLOCKS)
def test_an_example_of_the_documents_runs(block, tmp_path, monkeypatch, python):
    for library in ("jax", "keras", "torch"):  # which are not installed for the tests
        used = re.search(rf"^import {library}\b|KERAS_.*{library}", block, re.MULTILINE)
        if used and not find_spec(library):
            pytest.skip(f"{library} is missing")
    if "__main__" in block or "KERAS_BACKEND" in block:  # of several processes, or its own
        (tmp_path / "example.py").write_text(block, encoding="utf-8")
        python(str(tmp_path / "example.py"))
        return
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {})


def test_the_example_of_another_array_type_runs(python, tmp_path):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    python(str(tmp_path / "example.py"))


def test_type_checkers_are_told_that_the_package_is_typed(python):
    code = """
from importlib.resources import files
print(files("actreg_dispatch").joinpath("py.typed").is_file())
"""
    assert python("-c", code).stdout == "True\n"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_a_notebook_runs_and_is_kept_without_outputs(path, tmp_path, monkeypatch):
    for name in NEEDS.get(path.name, ()):
        pytest.importorskip(name)
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the checkout, whose kernels are in the cache
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)
