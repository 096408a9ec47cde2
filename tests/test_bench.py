"""The benchmark: that it runs, compares like with like, and reports what it found."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from actreg_dispatch.norms import ActivityNorm
from benchmarks import contenders, report, timing
from benchmarks.__main__ import PEERS, main
from benchmarks.contenders import CONTENDERS, LAYOUTS, NORMS, Case, Contender, Run

ROOT = Path(__file__).parent.parent
DTYPES = ["float16", "bfloat16", "float32", "float64"]
BY_NAME = {contender.name: contender for contender in CONTENDERS}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return a folder with the files of a small run."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "README.md").write_text("above\n{}\nold\n{}\nbelow\n".format(*report.MARKS["cpu"]))
    options = ["--sizes", "1", "4e3", "--dtypes", "float32", "bfloat16", "--norms", "l1", "l2"]
    options += ["--repeats", "1", "--peers", "NumPy", "--json", str(folder / "results.json")]
    options += ["--png", str(folder / "picture.png"), "--readme", str(folder / "README.md")]
    assert main(options) == 0
    return folder


def test_every_case_has_its_contenders(results):
    found = json.loads((results / "results.json").read_text())
    cases = {}
    for record in found["records"]:
        key = record["operation"], record["norm"], record["dtype"], record["size"]
        cases.setdefault(key, []).append(record["contender"])
    assert len(cases) == 2 * 2 * 2 * 2
    for (_, _, dtype, _), names in cases.items():
        assert names == ["limit", "numba", "numpy"] + ["NumPy"] * (dtype == "float32")
    assert all(record["agrees"] for record in found["records"])
    assert found["machine"]["threads"] >= 1
    assert {"numpy", "numba"} <= set(found["machine"]["versions"])


def test_figures_follow_from_the_times(results):
    records = json.loads((results / "results.json").read_text())["records"]
    case = [
        r
        for r in records
        if (r["operation"], r["norm"], r["dtype"], r["size"]) == ("apply", "l2", "float32", 4000)
    ]
    limit, ours, _, peer = case
    assert ours["gigabytes_per_second"] == pytest.approx(4 * 4 * 4000 / ours["seconds"] / 1e9, 1e-3)
    assert ours["ratio_to_limit"] == pytest.approx(ours["seconds"] / limit["seconds"], 1e-3)
    assert ours["ratio_to_best_peer"] == pytest.approx(ours["seconds"] / peer["seconds"], 1e-3)
    assert ours["best_peer"] == "NumPy"


def test_the_readme_gets_the_table_and_keeps_the_rest(results, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # of the terminal, or the table is wrapped
    text = (results / "README.md").read_text()
    begin, end = report.MARKS["cpu"]
    assert text.startswith(f"above\n{begin}\nMeasured with `python -m benchmarks` on ")
    assert text.endswith(f"{end}\nbelow\n")
    assert "\n| elements | 1 | 4,000 |\n| --- | ---: | ---: |\n" in text
    assert text.count("| `apply` l1, float32 |") == 1
    assert "old" not in text
    again = ["--from-json", str(results / "results.json")]
    assert main([*again, "--readme", str(results / "README.md")]) == 0
    assert (results / "README.md").read_text() == text
    assert "penalty l2, bfloat16, 4,000" in capsys.readouterr().out


def test_the_page_of_the_project_shows_the_results_that_are_kept():
    results = report.load(ROOT / "benchmarks" / "results.json")
    page = ROOT / "docs" / "performance.md"
    (begin, end), text = report.MARKS["cpu"], page.read_text(encoding="utf-8")
    assert f"{begin}\n{report.summary(results)}\n{end}\n" in text


def test_the_readme_of_the_project_shows_some_of_them():
    results = report.load(ROOT / "benchmarks" / "results.json")
    (begin, end), text = report.MARKS["brief"], (ROOT / "README.md").read_text(encoding="utf-8")
    table = report.brief(results)
    assert f"{begin}\n{table}\n{end}\n" in text
    lines = table.splitlines()
    assert len(lines) == 2 + 6
    assert all(
        re.fullmatch(r"\| `\w+` \w+, \w+( \| [\d.]+ [mµn]?s, [\d.]+ ×){4} \|", line)
        for line in lines[2:]
    )
    (record,) = (
        record
        for record in results["records"]
        if (record["operation"], record["norm"], record["dtype"], record["size"])
        == ("apply", "l1", "float32", 1_000_000)
        and (record["contender"], record["layout"]) == ("numba", "contiguous")
    )
    factor = f"{1 / record['ratio_to_best_peer']:.1f} ×"
    assert lines[2].split(" | ")[3] == f"{record['seconds'] * 1e6:.3g} µs, {factor}"


def test_the_small_table_is_written_where_it_is_asked_for(results):
    page = results / "small.md"
    begin, end = report.MARKS["brief"]
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    assert main(["--from-json", str(results / "results.json"), "--brief", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"above\n{begin}\n| elements | 1,000 |")
    assert text.endswith(f"{end}\nbelow\n")
    assert "old" not in text


def test_the_picture_is_a_png(results):
    assert (results / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "results.txt"], "let the name end in .json"),
        (["--json", "there.json"], "add --overwrite"),
        (["--png", "nowhere/picture.png"], "not a folder to write to"),
        (["--readme", "there.json"], "has no place for the table"),
        (["--readme", "missing.md"], "cannot be read"),
        (["--brief", "there.json"], "--brief there.json has no place for the table"),
        (["--from-json", "missing.json"], "cannot be read"),
        (["--from-json", "there.json"], "not written by python -m benchmarks"),
    ],
)
def test_bad_files_are_told_before_the_work(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    monkeypatch.setattr(timing, "_measure_case", None)
    assert main(options) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "{}"


def test_every_peer_is_on_the_list():
    processor = [c.name for c in CONTENDERS if c.kind == "peer"]
    assert [*processor, "CuPy", "cupy.fuse"] == list(PEERS)


TAKEN_BY_ALL = {"operation": {"apply", "penalty"}, "norm": set(NORMS), "dtype": set(DTYPES)}
TAKEN = {
    "NumPy": {"dtype": {"float16", "float32", "float64"}},
    "numexpr": {"dtype": {"float32", "float64"}},
    "PyTorch autograd": {"operation": {"apply"}},
    "Keras": {
        "operation": {"apply"},
        "norm": {ActivityNorm.L1, ActivityNorm.L2_SQUARED},
        "dtype": {"float32", "float64"},
    },
}


@pytest.mark.filterwarnings("ignore")  # what the peers warn of is not our business
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("operation", ["apply", "penalty"])
@pytest.mark.parametrize("name", [c.name for c in CONTENDERS if c.kind == "peer"])
def test_peers_do_the_same_work(name, operation, norm, dtype):
    contender = BY_NAME[name]
    if not contender.is_installed():
        pytest.skip(f"{contender.modules} are not installed")
    case = Case(operation, norm, dtype, 500)
    (records,) = timing.measure([case], [contender], 1)
    taken = TAKEN_BY_ALL | TAKEN.get(name, {})
    assert len(records) == all(getattr(case, key) in values for key, values in taken.items())
    for record in records:
        assert record["agrees"], record
        assert record["seconds"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_arrays_are_compared_with_a_loop_by_hand(layout):
    case = Case("apply", ActivityNorm.L1, "float32", 40_000, layout)
    ours = [BY_NAME[name] for name in ("limit", "numba", "NumPy")]
    (records,) = timing.measure([case], ours, 1)
    assert [record["contender"] for record in records] == ["limit", "numba", "NumPy"]
    assert all(record["agrees"] and record["size"] == 40_000 for record in records)
    shape, view = LAYOUTS[layout]
    assert view(np.zeros(shape(40_000))).flags.c_contiguous == (layout == "contiguous")


def test_a_wrong_result_is_told_and_is_no_peer():
    def wrong(task):
        return Run(lambda: 0.0, lambda: task.gradients)

    case = Case("apply", ActivityNorm.L1, "float32", 2000)
    liar = Contender("liar", "peer", ("numpy",), wrong)
    (records,) = timing.measure([case], [BY_NAME["numba"], liar], 1)
    assert [record["agrees"] for record in records] == [True, False]
    assert records[0]["best_peer"] is None
    assert records[0]["ratio_to_best_peer"] is None


def test_a_peer_that_fails_is_left_out():
    def fails(task):
        raise OSError("no compiler")

    case = Case("apply", ActivityNorm.L1, "float32", 2000)
    broken = Contender("broken", "peer", ("numpy",), fails)
    with pytest.warns(UserWarning, match="broken failed at .*no compiler"):
        (records,) = timing.measure([case], [BY_NAME["numba"], broken], 1)
    assert [record["contender"] for record in records] == ["numba"]


def test_too_large_a_size_is_explained(capsys):
    assert main(["--sizes", "1e17", "--dtypes", "float32", "--norms", "l1"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_peers_stop_where_their_temporaries_may_not_fit(monkeypatch):
    monkeypatch.setattr(contenders, "_PEERS_UP_TO", 10)
    task = timing._task(Case("apply", ActivityNorm.L1, "float32", 11), timing.CPU)[0]
    assert BY_NAME["NumPy"].run(task) is None
    assert BY_NAME["numba"].run(task) is not None


def test_the_slope_is_that_of_the_times():
    points = [(10**5, 1e-5), (10**6, 1e-4), (10**7, 1e-3), (10, 1.0)]
    records = [
        {
            "contender": "numba",
            "operation": "apply",
            "norm": "l1",
            "dtype": "float32",
            "layout": "contiguous",
            "size": size,
            "seconds": seconds,
        }
        for size, seconds in points
    ]
    assert timing.slope(records) == {"apply l1 float32": pytest.approx(1.0)}


def test_first_calls_are_faster_with_a_full_cache():
    found = timing.first_calls()
    first = "first call, parallel"
    assert found["full cache"][first] < found["empty cache"][first]
    assert all(math.isfinite(v) and v > 0 for times in found.values() for v in times.values())


def test_the_number_of_threads_is_a_limit(python, tmp_path):
    options = ["--sizes", "10", "--dtypes", "float32", "--norms", "l1", "--repeats", "1"]
    options += ["--peers", "--threads", "1", "--json", str(tmp_path / "r.json")]
    python("-m", "benchmarks", *options)
    assert json.loads((tmp_path / "r.json").read_text())["machine"]["threads"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "0"], "whole number"),
        (["--sizes", "many"], "whole number"),
        (["--norms", "l3"], "none of: l1, l2, l2_squared"),
        (["--peers", "Fortran"], "invalid choice"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_bad_options_are_explained(capsys, options, message):
    with pytest.raises(SystemExit):
        main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "matplotlib", "ml_dtypes"])
def test_what_is_missing_is_named_before_the_work(python, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import benchmarks.__main__ as m; "
    options = ["--dtypes", "bfloat16", "--png", "picture.png"]
    code += f"sys.exit(m.main({options}))"
    done = python("-c", code, check=False)
    assert done.returncode == 2
    assert f"the benchmark needs {missing}" in done.stderr
    assert "python -m pip install '.[bench]'" in done.stderr


def test_the_routes_are_compared_with_the_call_for_arrays(python):
    options = ["--sizes", "1000", "1_000_000", "--repeats", "1", "--only", "`"]
    done = python("-m", "benchmarks.routes", *options)
    head, rule, *rows = done.stdout.splitlines()
    assert head == "| elements | 1,000 | 1,000,000 |"
    assert rule == "| --- | ---: | ---: |"
    assert [row.split("|")[1].split("`")[1] for row in rows[:2]] == ["apply_all", ".npy"]
    for row in rows:
        for cell in row.split("|")[2:-1]:
            assert re.fullmatch(r" [\d.,e+]+ [µm]s; [\d.,]+( / [\d.,]+)? ", cell), cell


def test_dask_arrays_are_compared_with_plain_expressions(python):
    options = ["--size", "1000", "--on-disk", "0", "--repeats", "1"]
    done = python("-m", "benchmarks.dask_arrays", *options)
    head, _, *rows = done.stdout.splitlines()
    assert head == "| in memory, threads | float32 | float64 |"
    assert len(rows) == 6
    for row in rows:
        for cell in row.split("|")[2:-1]:
            assert re.fullmatch(r" [\d.]+ s; [\d.]+ ", cell), cell


def test_weights_are_compared_with_the_call_without(python):
    options = ["--tokens", "20", "--features", "30", "--repeats", "1"]
    done = python("-m", "benchmarks.weights", *options)
    head, rule, *rows = done.stdout.splitlines()
    columns = "features | tokens | mask of tokens | elements | statistics | per feature"
    assert head == f"| tokens x features | ms | {columns} | memory, elements |"
    assert rule == f"| --- |{' ---: |' * 8}"
    cells = [row[2:-2].split(" | ") for row in rows]
    assert [(name, memory) for name, *_, memory in cells] == [
        (f"{dtype}, {norm}, {call}", memory)
        for dtype in ("float32", "float64")
        for norm, update in (("L1", "1.67"), ("squared L2", "1.67"), ("L2", "1.50"))
        for call, memory in (("penalty", "2.00"), ("apply", update))
    ]
    assert all(re.fullmatch(r"[\d.]+", cell) for _, *figures in cells for cell in figures), cells


def test_norms_of_rows_are_compared_with_the_norm_of_the_whole(python):
    options = ["--size", "300", "--lengths", "7", "20", "--repeats", "1"]
    head, rule, *rows = python("-m", "benchmarks.row_norms", *options).stdout.splitlines()
    assert (head, rule) == ("| rows of | ms of l2 | 7 | 20 |", "| --- | ---: | ---: | ---: |")
    cells = [row[2:-2].split(" | ") for row in rows]
    calls = [f"{d}, {call}" for d in ("float32", "float64") for call in ("penalty", "apply")]
    assert [name for name, *_ in cells] == calls
    assert all(re.fullmatch(r"[\d.]+", cell) for _, *figures in cells for cell in figures), cells


def test_exact_sums_are_those_of_other_libraries(python):
    options = ["--size", "50", "--repeats", "1"]  # each row compares sums before it times them
    done = python("-m", "benchmarks.exact_sums", *options)
    peers = [peer for peer in ("xsum", "uniaccurate") if importlib.util.find_spec(peer)]
    tables = [table.splitlines() for table in done.stdout.rstrip().split("\n\n")]
    for (head, rule, *rows), title, dtypes in zip(
        tables, ("normal numbers", "120 binades"), (DTYPES, DTYPES[1:]), strict=True
    ):
        assert head == f"| {title} | ns | {' | '.join(['penalty', *peers])} |"
        assert rule == f"| --- |{' ---: |' * (2 + len(peers))}"
        sums = [f"{dtype}, {kind}" for dtype in dtypes for kind in (r"\|x\|", "x²", "both")]
        for row, name in zip(rows, sums, strict=True):
            found, *cells = row[2:-2].split(" | ")
            compared = name in (r"float64, \|x\|", "float64, x²")
            assert found == name
            assert [bool(cell.strip()) for cell in cells] == [True] * 2 + [compared] * len(peers)
            assert all(re.fullmatch(r" *([\d.]+)? *", cell) for cell in cells), cells


# On a GPU.


@pytest.fixture(scope="module")
def cuda_device(cupy):
    from benchmarks.cuda import CUDA

    assert [c.name for c in CUDA.contenders if c.kind == "peer"] == [
        name for name in ("CuPy", "cupy.fuse", "PyTorch eager", "torch.compile") if name in PEERS
    ]
    return CUDA


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("operation", ["apply", "penalty"])
def test_contenders_on_a_gpu_do_the_same_work(cuda_device, operation, norm, dtype):
    case = Case(operation, norm, dtype, 500)
    contenders = [c for c in cuda_device.contenders if c.is_installed()]
    (records,) = timing.measure([case], contenders, 1, device=cuda_device)
    names = [record["contender"] for record in records]
    assert names[:2] == ["limit", "cupy"]
    assert ("CuPy" in names) == (dtype != "bfloat16")
    assert ("cupy.fuse" in names) == (dtype in ("float32", "float64"))
    for record in records:
        assert record["agrees"], record
        assert record["seconds"] > 0


def test_strided_arrays_on_a_gpu(cuda_device):
    case = Case("apply", ActivityNorm.L1, "float32", 40_000, "channels last")
    (records,) = timing.measure([case], cuda_device.contenders[:3], 1, device=cuda_device)
    assert [record["contender"] for record in records] == ["limit", "cupy", "CuPy"]
    assert all(record["agrees"] and record["size"] == 40_000 for record in records)


def test_a_run_on_a_gpu_writes_its_files(cuda_device, tmp_path, capsys):
    places = [f"{mark}\n" for device in ("cpu", "cuda") for mark in report.MARKS[device]]
    (tmp_path / "README.md").write_text("".join(places))
    options = ["--sizes", "1", "4e3", "--dtypes", "float32", "--norms", "l1", "--repeats", "1"]
    options += ["--json", str(tmp_path / "results.json"), "--png", str(tmp_path / "picture.png")]
    options += ["--readme", str(tmp_path / "README.md"), "--device", "cuda"]
    options += ["--peers", "CuPy", "Keras"]
    assert main(options) == 0
    machine = json.loads((tmp_path / "results.json").read_text())["machine"]
    text = (tmp_path / "README.md").read_text()
    assert f"on {machine['processor']}, " in text
    assert "The limit is a copy within the memory of the device" in text
    assert text.startswith("".join(places[:3]))
    assert machine["versions"]["cupy"][0].isdigit()
    told = " ".join(capsys.readouterr().out.split())
    assert "Left out, not on cuda: Keras" in told
    software = "software" in machine["processor"]
    assert ("The times mean nothing" in told) == ("The times mean nothing" in text) == software


def test_options_of_the_processor_are_not_for_a_gpu(cuda_device, capsys):
    for option in (["--first-calls"], ["--threads", "1"]):
        assert main(["--device", "cuda", *option]) == 2
        assert "leave them out" in capsys.readouterr().err
