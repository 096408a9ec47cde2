"""The model of times on GPUs: its arithmetic, what is counted for it, and what the page shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from PIL import Image

from actreg_dispatch.norms import ActivityNorm
from benchmarks import model, report
from benchmarks.contenders import Case, load_dtype
from benchmarks.model import CONTENDERS, DTYPES, GPU, GPUS, Counts, marginal, ratio

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "model.json"

# 1000 bytes, 20 results in binary32, 10 in binary64 and 1280 instructions in a second.
SIMPLE = GPU("simple", 1000.0, 5, 2.0, 2, 1, "made up")


def counts(**some):
    return Counts(**{field: some.get(field, 0.0) for field in Counts._fields})


@pytest.mark.parametrize(
    ("some", "expected"),
    [
        ({"bytes": 4}, 1.0),  # 4 ms, which is the limit
        ({"bytes": 12}, 3.0),
        ({"bytes": 4, "f64": 0.1}, 2.5),  # 10 ms of binary64
        ({"bytes": 4, "f32": 0.1}, 1.25),  # 5 ms of binary32
        ({"bytes": 4, "f32": 0.1, "f64": 0.1}, 2.5),  # at the same time
        ({"bytes": 4, "int": 6.4, "memory": 2.56, "other": 3.84}, 2.5),  # 12.8 to issue: 10 ms
        ({"bytes": 4, "int": 1.0}, 1.0),
    ],
)
def test_the_slowest_resource_is_compared_with_the_memory_limit(some, expected):
    assert ratio(counts(**some), SIMPLE, least_bytes=4) == pytest.approx(expected)


def launch(name, loaded, stored, **issues):
    units = dict.fromkeys(Counts._fields[1:], 0) | issues
    return {"launch": name, "loaded": loaded, "stored": stored, "issues": units}


def test_what_an_element_costs_is_the_difference_of_two_sizes():
    fewer = [launch("pass", 4000, 10, f32=100, other=7), launch("finish", 50, 4, f64=9)]
    more = [launch("pass", 8000, 10, f32=200, other=7), launch("finish", 60, 4, f64=9)]
    assert marginal(fewer, more, 1000) == counts(bytes=4.01, f32=3.2)


def test_two_sizes_on_different_paths_are_not_compared():
    with pytest.raises(ValueError, match="give sizes of one path"):
        marginal([launch("small", 1, 1)], [launch("large", 2, 2)], 1)


# Tera-operations in binary32 and binary64, by the same data sheets and white papers; a
# multiply-add is two.
PEAKS = {
    "T4": (8.1, 8.1 / 32),
    "L4": (30.3, 30.3 / 64),
    "A10": (31.2, 31.2 / 64),
    "RTX 4090": (82.6, 82.6 / 64),
    "A100 SXM 80 GB": (19.5, 9.7),
    "H100 SXM": (67, 34),
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_the_figures_of_a_gpu_give_the_peaks_of_its_data_sheet(gpu):
    lanes = np.array([gpu.f32_lanes, gpu.f64_lanes])
    peaks = 2 * lanes * gpu.multiprocessors * gpu.clock / 1e12
    assert_allclose(peaks, PEAKS[gpu.name], rtol=0.02)


@pytest.mark.parametrize("norm", ActivityNorm)
def test_the_limit_is_what_every_implementation_moves(norm):
    two_pass = norm in (ActivityNorm.L2, ActivityNorm.HOYER)
    assert Case("penalty", norm, "float16", 10).bytes_moved() == 20
    assert Case("apply", norm, "float16", 10).bytes_moved() == (80 if two_pass else 60)


def test_the_page_shows_the_counts_that_are_kept():
    results = json.loads(KEPT.read_text(encoding="utf-8"))
    begin, end = report.MARKS["model"]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"{begin}\n{model.summary(results)}\n{end}\n" in page


def test_the_picture_on_the_page_is_of_the_counts_that_are_kept():
    panels = model.panels(json.loads(KEPT.read_text(encoding="utf-8")))
    with Image.open(ROOT / "benchmarks" / "model.png") as picture:
        assert picture.info["Comment"] == report.digest(panels)
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "](../benchmarks/model.png)" in page


def test_the_picture_has_the_throughput_that_follows_from_the_table():
    panels = model.panels(json.loads(KEPT.read_text(encoding="utf-8")))
    assert len(panels) == 8
    assert [*panels["penalty l1, float64"]] == ["limit", *CONTENDERS]
    for throughputs in panels.values():
        assert throughputs["limit"] == [gpu.bandwidth for gpu in GPUS]
        assert all(0 < found <= GPUS[0].bandwidth for found, *_ in throughputs.values())
    table = model.summary(json.loads(KEPT.read_text(encoding="utf-8")))
    (row,) = re.findall(r"^\| `penalty` l1, float64 \| (.*) \|$", table, re.MULTILINE)
    ours, plain, fused = map(float, row.split(" | ")[4].split(" / "))  # on the first GPU
    found = [GPUS[0].bandwidth / panels["penalty l1, float64"][name][0] for name in CONTENDERS]
    assert_allclose(found, [ours, plain, fused], atol=0.005)


def test_the_picture_is_drawn_from_a_former_run(monkeypatch, tmp_path, capsys):
    path = tmp_path / "model.png"
    assert model.main(["--from-json", str(KEPT), "--png", str(path)]) == 0
    with Image.open(path) as picture, Image.open(ROOT / "benchmarks" / "model.png") as kept:
        assert picture.info["Comment"] == kept.info["Comment"]
        assert picture.size == kept.size
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    assert model.main(["--from-json", str(KEPT), "--png", str(path)]) == 2
    assert "--png needs matplotlib" in capsys.readouterr().err


def test_a_former_run_is_shown_and_written_without_a_device(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("SOFTGPU_PROFILE", raising=False)
    page = tmp_path / "page.md"
    page.write_text("above\n{}\nold\n{}\nbelow\n".format(*report.MARKS["model"]))
    assert model.main(["--from-json", str(KEPT), "--write", str(page)]) == 0
    shown = capsys.readouterr().out
    begin, end = report.MARKS["model"]
    assert page.read_text(encoding="utf-8") == f"above\n{begin}\n{shown}{end}\nbelow\n"
    row = r"^\| `penalty` l1, float32 \|( [\d.]+ / [\d.]+ / [\d.]+ \|){10}$"
    assert re.search(row, shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a software CUDA device"),
        (["--from-json", "missing.json"], "missing.json"),
        (["--from-json", "there.json"], "not written by benchmarks.model"),
        (["--write", "there.json"], "--write there.json has no place for the table"),
        (["--png", "model.jpg"], "let the name end in .png"),
        (["--png", "nowhere/model.png"], "nowhere is not a folder to write to"),
    ],
)
def test_what_is_missing_is_told_before_the_work(monkeypatch, tmp_path, capsys, options, message):
    monkeypatch.delenv("SOFTGPU_PROFILE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    monkeypatch.setattr(model, "_counted", None)
    assert model.main(options) == 2
    assert message in capsys.readouterr().err


# On a device.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ActivityNorm)
def test_the_expressions_do_the_same_work(cupy, dtype, norm):
    kind, rng = load_dtype(dtype), np.random.default_rng(0)
    x = cupy.asarray(np.maximum(rng.standard_normal(500), 0).astype(kind))
    tolerance = {2: 1e-2, 4: 1e-5, 8: 1e-12}[kind.itemsize]
    results = []
    for contender in CONTENDERS.values():
        g = cupy.ones(500, kind)
        penalty = contender(Case("apply", norm, dtype, 500), x, g).step()
        assert g.dtype == kind
        assert penalty.dtype == np.result_type(np.float32, kind)
        results.append((float(penalty), g.get().astype(np.float64)))
    (penalty, gradients), *others = results
    for other, updated in others:
        assert other == pytest.approx(penalty, rel=min(tolerance, 1e-4))
        assert_allclose(updated, gradients, rtol=tolerance)


@pytest.mark.usefixtures("software_device")
def test_a_call_is_counted(python, tmp_path):
    file, profile = tmp_path / "counts.json", str(tmp_path / "profile.json")
    options = ["--norms", "l2", "--dtypes", "float16", "--operations", "apply"]
    done = python("-m", "benchmarks.model", *options, "--json", str(file), SOFTGPU_PROFILE=profile)
    assert "| `apply` l2, float16 |" in done.stdout
    ours, plain, fused = json.loads(file.read_text())["records"]
    assert [each["contender"] for each in (ours, plain, fused)] == list(CONTENDERS)
    assert ours["launches"] == 5
    assert ours["bytes"] == pytest.approx(8, rel=0.01)  # x twice, g in and out
    assert plain["bytes"] > fused["bytes"] > 7.9
    assert plain["f64"] == 0
