"""``actreg``: what a newcomer runs first."""

from __future__ import annotations

import re
import sys
from importlib import metadata

import numpy as np
import pytest

from actreg_dispatch import __version__, registry
from actreg_dispatch.backends.reference import ReferenceBackend
from actreg_dispatch.cli import main

# The demo.


@pytest.fixture(scope="module")
def outcomes():
    from actreg_dispatch.cli import demo

    return demo.sweep(demo.Settings(epochs=8))


def test_sparsity_rises_with_lam(outcomes):
    plain, *rest = outcomes
    for norm in ("l1", "l2_squared", "hoyer"):
        chosen = [plain, *(o for o in rest if o.regularization.norm == norm)]
        assert len(chosen) >= 5
        lams = [o.regularization.lam for o in chosen]
        assert lams == sorted(lams)
        shares = [o.zero_share for o in chosen]
        assert shares == sorted(shares)
        assert shares[-1] > shares[0] + 0.2
        errors = [o.error for o in chosen]
        assert errors[-1] > errors[0]


def test_outcomes_are_consistent(outcomes):
    for outcome in outcomes:
        digits, units = outcome.hidden.shape
        assert (digits, units) == (360, 100)
        np.testing.assert_allclose(outcome.active_units, units * (1 - outcome.zero_share))
        assert (outcome.active == np.count_nonzero(outcome.hidden, axis=0)).all()
        assert outcome.dead_units == (outcome.hidden == 0).all(axis=0).sum()
        np.testing.assert_allclose(np.linalg.norm(outcome.features, axis=1), 1, rtol=1e-5)
    size = np.abs(outcomes[3].hidden, dtype=np.float64).sum() / 360
    np.testing.assert_allclose(outcomes[3].penalty, outcomes[3].regularization.lam * size)


def test_the_last_panel_shows_how_often_each_unit_is_active(outcomes):
    from actreg_dispatch.cli import demo

    (panel,) = [each for each in demo.draw(outcomes).axes if "dead ones" in each.get_title()]
    l1 = next(o for o in outcomes if o.regularization.norm == "l1" and o.regularization.lam == 0.1)
    for line, outcome in zip(panel.lines, (outcomes[0], l1, outcomes[-1]), strict=True):
        shares = line.get_ydata()
        assert (shares == np.sort(outcome.active)[::-1] / 360).all()
        assert line.get_label().endswith(f": {np.count_nonzero(shares == 0)} dead")


def test_the_demo_prints_a_table_and_writes_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    out = tmp_path / "picture.png"
    assert main(["demo", "--epochs", "1", "--seed", "3", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    for heading in ("norm", "λ", "error", "at zero", "active", "dead", "penalty", "training 16"):
        assert heading in told
    assert len(re.findall(r"^│ (?:none|L1|squared L2|Hoyer-square) ", told, re.MULTILINE)) == 16
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 20_000


def test_the_demo_is_the_same_with_every_backend(backend):
    from actreg_dispatch import ActivityRegularization
    from actreg_dispatch.cli import demo

    images = tuple(part[:200] for part in demo.load_images())
    found = [
        demo.train(ActivityRegularization.l1(0.1), images, demo.Settings(epochs=1, backend=name))
        for name in ("numpy", backend.name)
    ]
    assert (found[0].hidden == found[1].hidden).all()


def test_the_demo_multiplies_in_one_thread(tmp_path, monkeypatch):
    from threadpoolctl import threadpool_info, threadpool_limits

    from actreg_dispatch.cli import demo

    threads = []

    def sweep(*_):
        threads.extend(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "sweep", sweep)
    with threadpool_limits(2, user_api="blas"):
        assert main(["demo", "--out", str(tmp_path / "x.png")]) == 130
    assert set(threads) == {1}


def test_the_demo_overwrites_only_when_told(tmp_path, monkeypatch, capsys):
    out = tmp_path / "mine.png"
    out.write_text("keep me")
    assert main(["demo", "--epochs", "1", "--out", str(out)]) == 2
    assert out.read_text() == "keep me"
    assert "exists; name another file, or add --overwrite" in capsys.readouterr().err
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path / "mine")]) == 2
    assert "let the name end in .png" in capsys.readouterr().err
    (tmp_path / "folder.png").mkdir()
    assert main(["demo", "--out", str(tmp_path / "folder.png"), "--overwrite"]) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "actreg-demo.png").write_text("keep me too")
    assert main(["demo", "--epochs", "1"]) == 0
    assert (tmp_path / "actreg-demo.png").read_text() == "keep me too"
    assert (tmp_path / "actreg-demo-2.png").exists()
    assert main(["demo", "--epochs", "1", "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_demo_needs_a_folder_to_write_to(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "none" / "x.png")]) == 2
    assert "is not a folder to write to" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--backend", "bogus"], []])
def test_the_demo_complains_about_a_backend_before_it_trains(arguments, monkeypatch, capsys):
    monkeypatch.setenv("ACTREG_BACKEND", "" if arguments else "bogus")
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert "bogus" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seed", "-1"], ["--epochs", "x"]])
def test_the_demo_complains_about_numbers(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["demo", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_without_its_extra_the_demo_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "actreg_dispatch.cli.demo", raising=False)
    monkeypatch.delattr("actreg_dispatch.cli.demo", raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 2
    told = capsys.readouterr().err
    assert "the demo needs rich" in told
    assert "python -m pip install matplotlib rich scikit-learn" in told


# The doctor.


def unwrapped(capsys):
    """Return what was told, with one space for each gap and line break."""
    return " ".join(capsys.readouterr().out.split())


def test_the_doctor_finds_the_backends_right(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert f"actreg_dispatch {__version__}" in told
    assert f"NumPy {np.__version__}" in told
    entries = re.sub(r"\n {7}", " ", told)  # a line each
    assert re.search(
        r"^numba +usable, agrees with exact .*threading layer \w+, \d+ thr", entries, re.M
    )
    assert re.search(r"^numpy +usable, agrees with exact arithmetic$", entries, re.MULTILINE)
    assert re.search(r"^cupy +(usable, agrees.*compute capability|unusable: .*pip )", entries, re.M)
    assert "ACTREG_BACKEND is not set\n  a numpy.ndarray is computed by numba" in told


def test_the_doctor_says_which_libraries_there_are(monkeypatch, capsys):
    there = {"torch": "2.9", "zarr": "3.1"}

    def version(name):
        try:
            return there[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(metadata, "version", version)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "\ntorch  installed, version 2.9\n" in told
    assert "\nzarr   installed, version 3.1\n" in told
    for name in ("jax", "keras", "dask"):
        remedy = f"python -m pip install 'actreg-dispatch[{name}]'"
        assert f"\n{name:6} not installed: {remedy}\n" in told


def test_the_doctor_says_what_the_variable_leads_to(monkeypatch, capsys):
    monkeypatch.setenv("ACTREG_BACKEND", "numpy")
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "ACTREG_BACKEND is 'numpy'\n  a numpy.ndarray is computed by numpy" in told


def test_the_doctor_fails_where_the_variable_leads_nowhere(monkeypatch, registered, capsys):
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    assert main(["doctor"]) == 1
    assert "ACTREG_BACKEND='bogus' names no backend" in unwrapped(capsys)

    monkeypatch.setenv("ACTREG_BACKEND", "broken")
    registry.register_backend("broken", lambda: 1 / 0, array_type="broken.Array", install="Mend it")
    assert main(["doctor"]) == 1
    told = unwrapped(capsys)
    assert "broken unusable: ZeroDivisionError: division by zero. Mend it" in told
    assert "ACTREG_BACKEND='broken': backend 'broken' cannot run here" in told


@pytest.mark.parametrize("wrong", ["penalty", "gradient", "raises"])
def test_the_doctor_fails_a_wrong_backend(registered, monkeypatch, capsys, wrong):
    class Wrong(ReferenceBackend):
        name = "wrong"

        def apply(self, activations, gradients, *options):
            if wrong == "raises":
                raise OSError("the wire is cut")
            penalty = super().apply(activations, gradients, *options)
            if wrong == "gradient":
                gradients[-1:] = np.nextafter(gradients[-1:], 9)
            return np.nextafter(penalty, type(penalty)(9)) if wrong == "penalty" else penalty

    registry.register_backend("wrong", Wrong, array_type="numpy.ndarray")
    assert main(["doctor"]) == 1
    told = unwrapped(capsys)
    assert "wrong FAILED its self-test: " in told
    assert {"penalty": "exactly rounded", "gradient": "1 gradients", "raises": "cut"}[wrong] in told


# Both.


def test_it_speaks_to_a_terminal_without_greek(python):
    told = python("-m", "actreg_dispatch", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert re.search(r"show what \?\s+does", told.stdout)


def test_the_doctor_works_where_nothing_is_compiled(python):
    code = "from actreg_dispatch.cli.doctor import examine; examine()"
    told = python("-c", code, NUMBA_DISABLE_JIT="1").stdout
    assert re.search(r"^numba +unusable: NUMBA_DISABLE_JIT is set", told, re.MULTILINE)
    assert "a numpy.ndarray is computed by numpy" in told


def test_a_command_that_is_gone_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["actreg", "bench", "--sizes", "1000"])
    for arguments in (None, ["bench"], ["bench", "--quick"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert "run: python -m benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "doctor"])
def test_an_interrupt_is_one_line(command, monkeypatch, capsys, tmp_path):
    from actreg_dispatch.cli import demo, doctor

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "sweep", interrupted)
    monkeypatch.setattr(doctor, "self_test", interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == "actreg: interrupted\n"
    assert not [*tmp_path.iterdir()]


def test_output_that_nobody_reads_ends_it_quietly(tmp_path, python):
    np.save(tmp_path / "x.npy", np.ones(3))
    code = """
import os, sys
from actreg_dispatch.cli import main
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.exit(main(["penalty", sys.argv[1], "--lam", "1", "--backend", "numpy"]))
"""
    done = python("-c", code, str(tmp_path / "x.npy"), check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_it_runs_as_a_module(python):
    assert python("-m", "actreg_dispatch", "--version").stdout == f"actreg_dispatch {__version__}\n"
    told = python("-m", "actreg_dispatch", check=False)
    assert (told.returncode, told.stdout) == (2, "")
    assert "COMMAND" in told.stderr
    assert "print the penalty of activations" in told.stderr  # the commands


@pytest.mark.parametrize("command", ["demo", "penalty", "apply", "doctor"])
def test_a_command_describes_itself_and_its_options(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    _, description, *groups = told.split("\n\n")
    assert description.rstrip().endswith(".")
    assert "None" not in told
    options = groups[-1].partition("\n")[2]
    for option in re.split(r"\n(?=  -)", options.rstrip()):  # each with some words
        assert re.search(r"(?: {2,}|\n {20,})\w+ \w+", option.lstrip()), option
