"""What is built holds what it should, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tracked():
    """Return the names of the files of the checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, tracked):
    """Return the sdist, and the wheel that is built of it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_holds_the_package_alone(distributions, tracked):
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert {name.partition("/")[2] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
    }
    assert names - about == {name for name in tracked if name.startswith("actreg_dispatch/")}
    assert {Path(name).suffix for name in names - about} == {".py", ".cuh", ".typed"}
    assert "actreg_dispatch/py.typed" in names
    assert "actreg_dispatch/backends/cuda/certified_sum.cuh" in names


def test_the_sdist_holds_what_builds_tests_and_documents_it(distributions, tracked):
    with tarfile.open(distributions[0]) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert names == {name for name in tracked if not name.startswith(".ci/")} | {"PKG-INFO"}
    for name in ("docs/conf.py", "notebooks/01_quickstart.ipynb", "tests/conftest.py"):
        assert name in names
