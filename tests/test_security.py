"""What others may have written: nothing in it is run, and no name in it is followed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

import actreg_dispatch
from actreg_dispatch import ActivityRegularization, files
from actreg_dispatch.files import journal

REG = ActivityRegularization.l1(0.5)
VALUES = np.linspace(-1, 1, 1000, dtype=np.float32)  # 4 blocks

links = pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are followed here")


NEVER = {"marshal", "pickle", "shelve", "yaml", "subprocess"}
NEVER |= {"http", "requests", "socket", "ssl", "urllib"}


def test_nothing_unpickles_or_evaluates():
    """The one exception evaluates what is made of symbols and counts, in two places."""
    found = set()
    package = Path(actreg_dispatch.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                modules = [module] if module else [each.name for each in node.names]
                for each in modules:
                    top = each.partition(".")[0]
                    if top in NEVER:
                        found.add((path.name, top))
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                module = getattr(getattr(node.func, "value", None), "id", "")
                if name in {"eval", "exec", "system"} or (module, name) == ("np", "load"):
                    found.add((path.name, name))
    assert found == {("norms.py", "exec"), ("rows.py", "exec")}


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Activations and gradients that are updated in part, alone in a folder, and their journal."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    folder = tmp_path / "given"
    folder.mkdir()
    x, g = folder / "x.npy", folder / "g.npy"
    np.save(x, VALUES)
    np.save(g, VALUES)
    blocks = []

    def stop(*step):
        blocks.append(step)
        if len(blocks) == 2:
            raise RuntimeError

    with pytest.raises(files.PartlyUpdatedError):
        files.apply(REG, x, g, progress=stop)
    path = files.journal_of(g)
    assert path.exists()
    assert (np.load(g) != VALUES).any()
    return x, g, path


def page_of(path, place):
    with path.open("rb") as file:
        file.seek(place)
        return json.loads(json.loads(file.read(4096))["of"])


def put_page(path, place, description):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(journal._page(description))


def everything(folder):
    """Return each file under a folder and its content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_journal_that_nobody_touched_is_resumed(interrupted):
    x, g, path = interrupted
    files.apply(REG, x, g, resume=True)
    assert (np.load(g) == VALUES + 0.5 * np.sign(VALUES)).all()
    assert not path.exists()


BAD_COUNTS = ["1000", -1, 1.5, True, None, [1000], {"of": 1}]
FORGED = (
    [{key: value} for key in ("block bytes", "slot bytes") for value in BAD_COUNTS]
    + [{"slot bytes": size} for size in (0, 1001, 10**18)]
    + [{"block bytes": 10**18}, {"gradients": "../outside.npy"}, {"activations": ["x"]}]
)


@pytest.mark.parametrize("changes", FORGED, ids=str)
def test_a_journal_that_says_something_else_is_refused(tmp_path, interrupted, changes):
    x, g, path = interrupted
    put_page(path, 0, page_of(path, 0) | changes)
    before = everything(tmp_path)
    with pytest.raises(files.FilesError, match=r"no complete journal|is of an update with"):
        files.apply(REG, x, g, resume=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "changes",
    [{"block": each} for each in (-1, 4, 10**18, "../outside", "0", None, True)]
    + [{"bytes": each} for each in (-4, 0, 996, 10**18, "../outside", None)],
    ids=str,
)
def test_a_block_that_is_none_is_refused(tmp_path, interrupted, number, changes):
    x, g, path = interrupted
    place = 4096 + number * (4096 + 1000)
    put_page(path, place, page_of(path, place) | changes)
    before = everything(tmp_path)
    with pytest.raises(files.FilesError, match=r"has a block that .* have not"):
        files.apply(REG, x, g, resume=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("text", ["[1]", "7", '"../outside"', "null", "[" * 1500 + "]" * 1500])
def test_a_journal_of_another_shape_is_refused(tmp_path, interrupted, text):
    x, g, path = interrupted
    page = json.dumps({"crc32": zlib.crc32(text.encode()), "of": text}).encode().ljust(4096)
    with path.open("r+b") as file:
        file.write(page)
    before = everything(tmp_path)
    with pytest.raises(files.FilesError, match="no complete journal"):
        files.apply(REG, x, g, resume=True)
    assert everything(tmp_path) == before


def test_names_in_a_journal_are_not_read(tmp_path, interrupted):
    x, g, path = interrupted
    outside = tmp_path / "outside.npy"
    np.save(outside, VALUES)
    before = outside.read_bytes()
    names = dict.fromkeys(("path", "name", "file", "journal"), "../outside.npy")
    put_page(path, 0, page_of(path, 0) | names)
    files.apply(REG, x, g, resume=True)
    assert outside.read_bytes() == before
    assert (np.load(g) == VALUES + 0.5 * np.sign(VALUES)).all()


@links
@pytest.mark.parametrize("content", ["the journal", "nothing", "no file"])
def test_a_journal_that_is_a_link_is_not_followed(tmp_path, interrupted, content):
    x, g, path = interrupted
    outside = tmp_path / "outside"
    if content == "the journal":
        path.rename(outside)
    else:
        path.unlink()
        if content == "nothing":
            outside.touch()
    path.symlink_to(outside)
    before = everything(tmp_path)
    with pytest.raises(files.FilesError, match="is a symbolic link, so it is no journal"):
        files.apply(REG, x, g, resume=True)
    with pytest.raises(files.FilesError, match="exists: an update"):
        files.apply(REG, x, g)
    assert path.is_symlink()
    assert everything(tmp_path) == before


@links
def test_a_journal_that_is_a_pipe_is_refused_at_once(interrupted):
    x, g, path = interrupted
    path.unlink()
    os.mkfifo(path)
    before = g.read_bytes()
    with pytest.raises(files.FilesError, match="is no regular file, so it is no journal"):
        files.apply(REG, x, g, resume=True)
    assert path.is_fifo()
    assert g.read_bytes() == before


@pytest.fixture
def stores(tmp_path):
    """Two Zarr arrays."""
    if sys.version_info < (3, 11):
        pytest.skip("Zarr 3 needs Python 3.11")
    import zarr

    paths = [tmp_path / name for name in "xg"]
    for path in paths:
        array = zarr.create_array(path, shape=(1000,), chunks=(250,), dtype="f4", compressors=None)
        array[...] = VALUES
    return paths


@links
@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("what", ["c/2", "c", "zarr.json"])
def test_no_link_in_a_store_is_followed(tmp_path, stores, whose, what):
    outside = tmp_path / "outside"
    inside = stores[whose] / what
    inside.rename(outside)
    inside.symlink_to(outside)
    before = everything(tmp_path)
    with pytest.raises(files.FilesError, match=r"have a symbolic link, .*, which is not followed"):
        files.apply(REG, *stores)
    with pytest.raises(files.FilesError, match="have a symbolic link"):
        files.penalty(REG, stores[whose])
    assert everything(tmp_path) == before


@links
def test_the_name_that_is_given_may_be_a_link(tmp_path, stores):
    links = [tmp_path / f"link to {path.name}" for path in stores]
    for link, path in zip(links, stores, strict=True):
        link.symlink_to(path)
    files.apply(REG, *links)
    found = np.frombuffer((stores[1] / "c" / "2").read_bytes(), np.float32)
    assert (found == VALUES[500:750] + np.float32(0.5)).all()


class Trap:
    """Ends the test run if it is unpickled."""

    def __reduce__(self):
        return os._exit, (13,)


@pytest.mark.parametrize("kind", ["filters", "compressor"])
@pytest.mark.parametrize("dtype", ["<f4", "|O"])
def test_a_store_that_is_pickled_is_refused(tmp_path, stores, kind, dtype):
    codec = {"id": "pickle", "protocol": 5}
    metadata = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": dtype, "order": "C"}
    metadata |= {"fill_value": 0, "filters": None, "compressor": None}
    metadata[kind] = [codec] if kind == "filters" else codec
    store = tmp_path / "pickled"
    store.mkdir()
    (store / ".zarray").write_text(json.dumps(metadata))
    (store / "0").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(files.FilesError, match=r"cannot be read as a Zarr array|never loaded"):
        files.penalty(REG, store)
