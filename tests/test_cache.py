"""Numba's cache on disk: found again, done without where it fails, and switched off."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import actreg_dispatch

CODE = """
import json
import numpy as np
from actreg_dispatch import ActivityRegularization
from actreg_dispatch.backends.numba import compiling
x = np.arange(5, dtype=np.float32)
reg = ActivityRegularization.l1(0.5)
penalty = float(FOUND)
hits = []
for kernel in compiling.KERNELS.values():
    if type(kernel).__name__ == "CPUDispatcher":
        hits.append(sum(kernel.stats.cache_hits.values()))
    elif type(kernel).__name__ == "CFunc":
        hits.append(kernel.cache_hits)
print(json.dumps([penalty, hits, compiling.__file__]))
"""
CALL = CODE.replace("FOUND", "reg.penalty(x)")  # a driver and four C functions
LAYERS = CODE.replace("FOUND", "reg.apply_all([x], [np.zeros_like(x)]).total")  # two drivers more
SUM = CODE.replace("FOUND", "reg.finish(reg.partial_sum(x))")  # two drivers and a C function
ROWS = CODE.replace("l1(0.5)", "l2(0.5, axis=-1)").replace(  # a driver and a C function
    "FOUND", "reg.penalty(np.float32([[3, 4], [0, 15]]))"
)
CODE = CALL


@pytest.mark.parametrize(
    ("code", "penalty", "kernels"),
    [(CALL, 5.0, 5), (LAYERS, 5.0, 7), (SUM, 5.0, 3), (ROWS, 10.0, 2)],
    ids=["call", "layers", "sum", "rows"],
)
def test_a_second_process_finds_the_kernels_of_the_first(python, tmp_path, code, penalty, kernels):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "ACTREG_CACHE": "1"}
    first, second = (json.loads(python("-c", code, **cache).stdout)[:2] for _ in range(2))
    assert first == [penalty, [0] * kernels]
    assert second == [penalty, [1] * kernels]


def test_the_cache_can_be_switched_off(python, tmp_path):
    cache = tmp_path / "cache"
    python("-c", CODE, NUMBA_CACHE_DIR=str(cache), ACTREG_CACHE="0")
    assert not cache.exists()


def test_the_switch_is_0_or_1(python):
    done = python("-c", CODE, ACTREG_CACHE="maybe", check=False)
    assert "ACTREG_CACHE='maybe' must be 0 or 1" in done.stderr


@pytest.fixture(scope="module")
def full_cache(python, tmp_path_factory):
    """Return a cache that a process has filled."""
    cache = tmp_path_factory.mktemp("full") / "cache"
    python("-c", CODE, NUMBA_CACHE_DIR=str(cache), ACTREG_CACHE="1")
    return cache


@pytest.mark.parametrize("damage", [b"", b"junk", None], ids=["empty", "junk", "folder"])
def test_a_damaged_cache_is_done_without(python, full_cache, tmp_path, damage):
    cache = shutil.copytree(full_cache, tmp_path / "cache")
    files = [p for p in cache.rglob("*") if p.suffix in (".nbi", ".nbc")]
    assert files
    for path in files:
        path.unlink()
        path.mkdir() if damage is None else path.write_bytes(damage)
    done = python("-c", CODE, NUMBA_CACHE_DIR=str(cache), ACTREG_CACHE="1")
    assert json.loads(done.stdout)[0] == 5.0


def test_where_nothing_can_be_written_kernels_are_compiled(python, tmp_path):
    """A copy of the package whose cache folders are files, so that nobody can create them."""
    package = Path(actreg_dispatch.__file__).parent
    copy = tmp_path / "copy" / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "backends" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    home = str(tmp_path / "home")
    done = python(
        "-c",
        CODE,
        PYTHONPATH=str(copy.parent),
        HOME=home,
        XDG_CACHE_HOME=home,
        LOCALAPPDATA=home,
        ACTREG_CACHE="1",
        PYTHONSAFEPATH="1",
    )
    penalty, _, file = json.loads(done.stdout)
    assert penalty == 5.0
    assert Path(file).is_relative_to(copy)


def test_processes_may_fill_the_cache_at_once(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "ACTREG_CACHE": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", CODE], env=environment, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [json.loads(text)[0] for text in printed] == [5.0] * 4


@pytest.mark.parametrize("file", ["sums/certified.py", "backends/numba/rows.py"])
def test_new_arithmetic_is_a_new_entry(python, tmp_path, file):
    """Also where a process compiles the old one after it has been edited."""
    package = Path(actreg_dispatch.__file__).parent
    copy = tmp_path / "copy" / package.name
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    edit = f"""
import actreg_dispatch.backends.numba
with open({str(copy / file)!r}, "a") as edited:
    edited.write("# edited")
"""
    options = {
        "PYTHONPATH": str(copy.parent),
        "PYTHONSAFEPATH": "1",
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "ACTREG_CACHE": "1",
    }
    codes = [edit + CALL, CALL, CALL]
    found = [json.loads(python("-c", code, **options).stdout) for code in codes]
    assert [hits for _, hits, _ in found] == [[0] * 5, [0] * 5, [1] * 5]
    assert all(Path(file).is_relative_to(copy) for _, _, file in found)


def test_options_that_change_the_code_are_a_new_entry(python, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "ACTREG_CACHE": "1"}
    checked = {"NUMBA_BOUNDSCHECK": "1"}
    threads = {"NUMBA_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    hits = []
    for options in (checked, {}, threads, checked):
        hits.append(json.loads(python("-c", CODE, **cache, **options).stdout)[1])
    assert hits == [[0] * 5, [0] * 5, [1] * 5, [1] * 5]


SUMS = """
import sys
import numpy as np
from actreg_dispatch import ActivityRegularization
x = np.linspace(-1, 2, 5000, dtype=np.float32).reshape(100, 50)
weights = np.linspace(0, 1, 50, dtype=np.float32)
for norm in sys.argv[1:]:
    found = []
    for backend in ("numba", "numpy"):
        reg, g = ActivityRegularization(0.1, norm, backend=backend), np.ones_like(x)
        parts = [*reg.partial_sum(x).parts, *reg.partial_sum(x, weights=weights).parts]
        found.append(([part.units for part in parts], reg.apply(x.T, g.T), g.tobytes()))
    assert found[0] == found[1], norm
"""


def test_kernels_that_several_processes_have_kept_are_not_taken_for_each_other(python, tmp_path):
    # Machine code is linked by names, in which Numba counts the functions of a process.
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "ACTREG_CACHE": "1"}
    norms = ["l1", "l2_squared", "l1_l2_squared"]
    for norm in norms:
        python("-c", SUMS, norm, **cache)
    for together in (norms, norms[::-1]):
        python("-c", SUMS, *together, **cache)


def test_compiled_closures_have_names_of_their_own(python):
    code = SUMS + (
        "rows = ActivityRegularization.l2(0.1, axis=-1)\n"
        "for given in ({}, {'weights': weights}):\n"
        "    rows.finish(rows.partial_sum(x, **given)), rows.apply(x, np.ones_like(x), **given)\n"
        "import re\n"
        "from actreg_dispatch.backends.numba.compiling import KERNELS\n"
        "for kernel in KERNELS.values():\n"
        "    if hasattr(kernel, 'inspect_llvm'):\n"
        "        code = kernel.inspect_llvm()\n"
        "        code = code if isinstance(code, str) else ' '.join(code.values())\n"
        "        print(*re.findall(r'^define .*@\"?(_ZN15actreg[^\"(]+)', code, re.M), sep='\\n')\n"
    )
    norms = ["l1", "l2", "hoyer"]
    names = set(python("-c", code, *norms, ACTREG_CACHE="0").stdout.split())
    names = {re.split(r"B\d+v\d", name)[0] for name in names}  # without the types of arguments
    closures = [name for name in names if "_3clocals_3e" in name]
    assert any("add_tile" in name for name in closures)
    for name in closures:  # its parts are preceded by their lengths, the last one is a hash
        assert re.search(r"_3clocals_3e\d+[a-z_]+(8|9_)[0-9a-f]{8}$", name), name
