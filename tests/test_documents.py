"""What the documents show is run."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from actreg_dispatch import registry
from benchmarks.__main__ import _parser as benchmarks_parser

ROOT = Path(__file__).parent.parent
NEEDS = {  # notebook -> what may not be installed for the tests
    "02_pytorch.ipynb": ("torch",),
    "03_dask.ipynb": ("resource",),  # of Unix
    "04_weights.ipynb": ("torch",),
}
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "api").glob("*.md")),
]
FENCE = re.compile(r"^( *)```(.*?)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks_of(page):
    """Return what kind of block each is, and what is in it."""
    text = page.read_text(encoding="utf-8")
    return [
        (kind, re.sub(f"^{indent}", "", block, flags=re.M))
        for indent, kind, block in FENCE.findall(text)
    ]


def prose_of(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


LIBRARIES = ("cupy", "jax", "keras", "torch")  # which are not installed for the tests


def libraries_of(block):
    """Return those of the libraries that a block takes."""
    needs = r"^import {0}\b|KERAS_.*{0}"
    return [each for each in LIBRARIES if re.search(needs.format(each), block, re.MULTILINE)]


EXAMPLES = [
    pytest.param(
        block,
        id="-".join([page.stem, str(number), *libraries_of(block)]),
        marks=[pytest.mark.cuda] if "import cupy" in block else [],
    )
    for page in PAGES
    for number, block in enumerate(block for kind, block in blocks_of(page) if kind == "python")
]
COMMANDS = {  # once each
    line: pytest.param(page, line, id=line)
    for page in PAGES
    for kind, block in blocks_of(page)
    if kind == "sh"
    for line in block.splitlines()
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings_of_files(page):
    for link, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", prose_of(page)):
        file = page.parent / link if link else page
        assert file.is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", prose_of(file), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{link}#{heading}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_blocks_of_code_are_of_a_kind_that_is_run(page):
    kinds = {kind for kind, _ in blocks_of(page)}
    assert not {kind for kind in kinds if not kind.startswith("{")} - {"python", "sh"}


@pytest.mark.parametrize("block", EXAMPLES)
def test_an_example_of_the_documents_runs(block, tmp_path, monkeypatch, python, request):
    for library in libraries_of(block):
        required = library in request.config.getoption("--require-backend")
        missing = not find_spec(library)
        if library == "cupy":
            missing = registry.why_unavailable("cupy")
        if missing:
            (pytest.fail if required else pytest.skip)(f"{library} is missing")
    run(block, tmp_path, monkeypatch, python)


def run(block, folder, monkeypatch, python):
    if "__main__" in block or "KERAS_BACKEND" in block:  # of several processes, or its own
        (folder / "example.py").write_text(block, encoding="utf-8")
        python(str(folder / "example.py"))
        return
    monkeypatch.chdir(folder)
    exec(compile(block, "example", "exec"), {})


# What is run by .ci/run, or changes the machine.
ELSEWHERE = (
    'python -m pip install ".[',
    "python -m pip install ",
    "python -m pytest",
    "python -m sphinx",
    "python -m build",
    "python -m pip_audit",
    "python -m twine",
    "bash .ci/run",
    "compute-sanitizer --tool ",
    "coverage run ",
    "git tag ",
    "ruff check ",
)


@pytest.mark.parametrize(("page", "line"), COMMANDS.values())
def test_a_command_of_the_documents_runs_or_is_known(page, line, tmp_path, monkeypatch, python):
    if line.startswith("python -m benchmarks "):  # which takes minutes
        benchmarks_parser().parse_args(shlex.split(line)[3:])
        return
    *settings, first = re.match(r"(?:(\w+)=(\w+) )?(\S+)", line).groups()
    if first != "actreg":
        assert line.startswith(ELSEWHERE)
        return
    for kind, block in blocks_of(page):  # which makes the files
        if kind == "python" and "np.save" in block:
            run(block, tmp_path, monkeypatch, python)
    environment = {settings[0]: settings[1]} if settings[0] else {}
    script = f"import os, sys; os.chdir({str(tmp_path)!r}); from actreg_dispatch.cli import main"
    arguments = shlex.split(line.partition("actreg ")[2])
    done = python("-c", f"{script}; sys.exit(main(sys.argv[1:]))", *arguments, **environment)
    assert done.stdout


def test_the_log_says_which_backend_ran_as_the_page_shows(python):
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    settings, line = re.findall(r"^`((?:logging\.|DEBUG:).*)`$", page, re.MULTILINE)
    code = f"""
import logging
import numpy as np
from actreg_dispatch import ActivityRegularization
{settings}
reg = ActivityRegularization.l1(0.1)
for _ in range(2):
    reg.penalty(np.ones(3))
"""
    assert python("-c", code).stderr.splitlines().count(line) == 1


def test_documents_name_the_extras_that_there_are():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^([\w-]+) = \[", project.split("[project.optional-d")[1], re.M))
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.findall(r"""["']\.\[([\w,-]+)\]["']""", text):
            named |= set(found.split(","))
    assert named <= extras
    assert {"demo", "docs", "files", "jax", "test", "torch"} <= named


def test_the_readme_is_short_and_has_the_commands_to_begin_with():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.index('\npython -m pip install ".[demo]" && actreg demo\n') < text.index(
        '\npython -m pip install ".[test]" && python -m pytest\n'
    )


def test_the_changelog_has_the_version():
    """A release is in the changelog by its number; what is not released is under a title."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert titles[0] == ("Unreleased", "")
    assert all(number and date for number, date in titles[1:])
    number = ".".join(actreg_version().split(".")[:3])
    if ".dev" in actreg_version():
        assert f"This will be {number}." in text
    else:
        assert titles[1][0] == number


def test_the_version_is_written_down_once():
    for name in ("pyproject.toml", "CITATION.cff", "docs/conf.py"):
        assert actreg_version() not in (ROOT / name).read_text(encoding="utf-8")


def actreg_version():
    source = (ROOT / "actreg_dispatch" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.*)"$', source, re.MULTILINE)
    return version


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
