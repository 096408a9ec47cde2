"""The map of the package that the documentation site shows."""

from __future__ import annotations

import ast
import importlib.util
import re
from graphlib import CycleError
from pathlib import Path

import pytest

import actreg_dispatch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def house():
    """Return the module that draws the map, which is an extension of Sphinx."""
    pytest.importorskip("sphinx")
    path = ROOT / "docs" / "_ext" / "house.py"
    spec = importlib.util.spec_from_file_location("house", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(**sources):
    return {name.replace("__", "."): ast.parse(source) for name, source in sources.items()}


def test_imports_are_those_of_boxes(house):
    found = house.imports_of(
        modules(
            api="from actreg_dispatch import norms\nfrom actreg_dispatch.backends.cuda import x",
            norms="import numpy\nfrom actreg_dispatch.norms import itself",
            backends="",
            backends__cuda="from actreg_dispatch.norms import Norm\ndef f():\n    "
            "from actreg_dispatch.api import late",
            backends__cuda__kernels="from actreg_dispatch.backends.cuda import y",
        )
    )
    assert found == {"api": {"norms", "backends.cuda"}, "norms": set(), "backends.cuda": {"norms"}}


def test_arrows_that_follow_from_others_are_left_out(house):
    imports = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert house.reduced(imports) == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert house.rows_of(house.reduced(imports))[0] == [["a"], ["b"], ["c"]]


def test_an_arrow_over_several_rows_keeps_clear_of_boxes(house):
    rows, ways = house.rows_of({"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": set()})
    assert [sorted(row) for row in rows] == [["a"], ["a>d>1", "b"], ["c", "d"]]
    assert sorted(ways) == [["a", "a>d>1", "d"], ["a", "b"], ["b", "c"]]


def test_a_circle_is_an_error(house):
    with pytest.raises(CycleError):
        house.reduced({"a": {"b"}, "b": {"a"}})


def test_the_map_and_the_table_of_rooms_agree(house):
    found = house.read_modules()
    picture = house.picture(found)
    boxes = set(re.findall(r">([\w.]+)</text>", picture))
    assert boxes == set(house.imports_of(found))
    assert {"regularization", "backends.numba", "torch", "norms"} <= boxes
    assert picture.count('class="arrow"') > len(boxes)
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| room in")[1]
    paths = {box.replace(".", "/").removeprefix("runtime/") for box in boxes}
    named = set(re.findall(r"`([\w/]+?)(?:\.py|/)`", table.split("\n\n")[0]))
    assert paths <= named, paths - named


def test_the_reference_has_all_public_names():
    page = (ROOT / "docs" / "api" / "package.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(actreg_dispatch.__all__)


@pytest.mark.parametrize("name", ["dask", "files", "jax", "keras", "torch"])
def test_the_reference_has_all_names_of_a_module(name):
    page = (ROOT / "docs" / "api" / f"{name}.md").read_text(encoding="utf-8")
    assert f".. automodule:: actreg_dispatch.{name}\n   :members:\n" in page
