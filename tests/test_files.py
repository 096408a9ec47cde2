"""Files larger than memory: the bits of the same arrays in memory, whatever interrupts the run."""

from __future__ import annotations

import errno
import importlib
import io
import json
import math
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from actreg_dispatch import ActivityNorm, ActivityRegularization, files, registry
from actreg_dispatch.cli import main
from actreg_dispatch.files import journal, stores
from actreg_dispatch.oracle import exact_result

norms = pytest.mark.parametrize("norm", ActivityNorm, ids=lambda norm: norm.value)

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16, foreign": np.dtype(np.float16).newbyteorder(),
    "float32, foreign": np.dtype(np.float32).newbyteorder(),
    "float64, foreign": np.dtype(np.float64).newbyteorder(),
}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

ASKED = {DTYPES["bfloat16"]: "bfloat16"}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(files, "WINDOW_BYTES", 2000)


def values_of(shape, dtype, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    values[np.abs(values) < 0.1] = 0.0
    return values.astype(dtype)


def saved(folder, **arrays):
    """Save the arrays under their names, in their order, and return the paths."""
    paths = []
    for name, array in arrays.items():
        paths.append(folder / f"{name}.npy")
        np.save(paths[-1], array)
    return paths


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def assert_untouched(paths, before):
    assert [path.read_bytes() for path in paths] == before
    assert not list(paths[0].parent.glob("*actreg-journal"))


# The bits.


@norms
@dtypes
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_have_the_bits_of_exact_arithmetic(tmp_path, norm, dtype, order):
    x, g = (np.asarray(values_of((9, 7, 13), dtype, seed), order=order) for seed in (1, 2))
    penalty, updated = exact_result(x, g, norm, 0.1, scale=3.0)
    paths = saved(tmp_path, x=x, g=g)
    reg, asked = ActivityRegularization(0.1, norm), ASKED.get(dtype)

    alone = files.penalty(reg, paths[0], dtype=asked)
    found = files.apply(reg, *paths, scale=3.0, dtype=asked)

    assert alone.penalty.tobytes() == found.penalty.tobytes() == penalty.tobytes()
    assert (found.dtype, found.shape, found.elements) == (dtype.name, x.shape, x.size)
    left = np.load(paths[1])
    assert left.flags.f_contiguous == (order == "F")
    assert left.tobytes() == updated.tobytes()  # in C order, both
    assert_same_bits(np.load(paths[0]), np.load(saved(tmp_path, again=x)[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npy", "g.npy", "x.npy"]


@norms
@pytest.mark.parametrize(("reduction", "count"), [("mean", 2400), ("batch", 60)])
def test_reductions_divide_by_the_whole_file(tmp_path, backend, norm, reduction, count):
    x, g = (values_of((60, 40), np.float32, seed) for seed in (1, 2))
    penalty, updated = exact_result(x, g, norm, 0.1 / count)
    reg = backend.regularization(0.1, norm, reduction=reduction)
    paths = saved(tmp_path, x=x, g=g)
    assert files.penalty(reg, paths[0]).penalty == penalty
    result = files.apply(reg, *paths)
    assert result.penalty == penalty
    assert result.backend == backend.name
    assert_same_bits(np.load(paths[1]), updated)


TIES = {
    "float32": ([1.0, 2.0**-24], np.float32, 1.0),
    "above, in float32": ([1.0, 2.0**-24, 2.0**-45], np.float32, 1 + 2.0**-23),
    "float64": ([1.0, 2.0**-53], np.float64, 1.0),
    "above, in float64": ([1.0, 2.0**-53, 2.0**-140], np.float64, 1 + 2.0**-52),
}


@pytest.mark.parametrize(("terms", "dtype", "expected"), TIES.values(), ids=TIES)
def test_a_tie_takes_one_more_pass_that_writes_nothing(tmp_path, terms, dtype, expected):
    x = np.zeros(3000, dtype)  # each term is in a block of its own
    x[:: 3000 // len(terms)][: len(terms)] = terms
    paths = saved(tmp_path, x=x, g=np.zeros_like(x))
    reg = ActivityRegularization(1.0, backend="numba")
    alone, found = files.penalty(reg, paths[0]), files.apply(reg, *paths)
    assert alone.penalty == found.penalty == expected
    assert alone.passes == found.passes == 2
    assert_same_bits(np.load(paths[1]), np.sign(x))


def test_l2_of_a_tie_divides_by_the_exact_norm(tmp_path):
    x = np.zeros(3000)
    x[[0, 2000]] = 1.0, 2.0**-26  # the sum of squares is on a tie of √
    penalty, updated = exact_result(x, np.ones_like(x), ActivityNorm.L2, 1.0)
    paths = saved(tmp_path, x=x, g=np.ones_like(x))
    found = files.apply(ActivityRegularization.l2(1.0, backend="numba"), *paths)
    assert found.penalty == penalty
    assert_same_bits(np.load(paths[1]), updated)


@norms
def test_large_blocks_run_on_threads(tmp_path, norm, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 18)
    x, g = (values_of((1000, 300), np.float32, seed) for seed in (1, 2))
    paths = saved(tmp_path, x=x, g=g)
    reg = ActivityRegularization(0.1, norm)
    found, penalty = files.apply(reg, *paths), reg.apply(x, g)
    assert found.penalty == penalty
    assert_same_bits(np.load(paths[1]), g)


@pytest.mark.parametrize("epsilon", [0.0, 1e9])
def test_epsilon_decides_where_l2_has_a_gradient(tmp_path, epsilon):
    x = values_of(700, np.float32)
    penalty, updated = exact_result(x, np.ones_like(x), ActivityNorm.L2, 0.5, epsilon)
    paths = saved(tmp_path, x=x, g=np.ones_like(x))
    found = files.apply(ActivityRegularization.l2(0.5, epsilon=epsilon), *paths)
    assert found.penalty == penalty
    assert found.passes == (2 if epsilon == 0 else 1)
    assert_same_bits(np.load(paths[1]), updated)


@norms
@dtypes
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1, 700, 1)])
def test_empty_and_zero_dimensional_files(tmp_path, norm, dtype, shape):
    x, g = np.full(shape, -2.0, dtype), np.ones(shape, dtype)
    penalty, updated = exact_result(x, g, norm, 0.1)
    paths = saved(tmp_path, x=x, g=g)
    asked = ASKED.get(dtype)
    found = files.apply(ActivityRegularization(0.1, norm), *paths, dtype=asked)
    assert found.penalty.tobytes() == penalty.tobytes()
    assert np.load(paths[1]).tobytes() == updated.tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_format(tmp_path, version):
    x = values_of((30, 20), np.float64)
    paths = [tmp_path / "x.npy", tmp_path / "g.npy"]
    for path, other in zip(paths, (version, (1, 0)), strict=True):
        with path.open("wb") as file:
            np.lib.format.write_array(file, x, version=other)
    penalty, updated = exact_result(x, x, ActivityNorm.L1, 0.1)
    assert files.apply(ActivityRegularization.l1(0.1), *paths).penalty == penalty
    assert_same_bits(np.load(paths[1]), updated)


@norms
@pytest.mark.parametrize("paddings", [(3, 6), (5_003, 9_906)], ids=["short", "long"])
def test_data_at_odd_places_and_what_follows_it(tmp_path, norm, paddings):
    x, g = values_of(700, np.float64, 1), values_of(700, np.float64, 2)
    paths = [tmp_path / "x.npy", tmp_path / "g.npy"]
    for path, values, padding in zip(paths, (x, g), paddings, strict=True):
        header = repr({"descr": "<f8", "fortran_order": False, "shape": (700,)}).encode()
        header += b" " * padding + b"\n"
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        assert len(start) % 8
        path.write_bytes(start + values.tobytes() + b"more")
    penalty, updated = exact_result(x, g, norm, 0.1)
    assert files.apply(ActivityRegularization(0.1, norm), *paths).penalty == penalty
    assert_same_bits(np.load(paths[1]), updated)
    assert paths[1].read_bytes().endswith(b"more")


@norms
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_propagates(tmp_path, norm, bad):
    x, g = values_of(700, np.float32, 1), values_of(700, np.float32, 2)
    x[600] = bad
    paths = saved(tmp_path, x=x, g=g)
    reg = ActivityRegularization(0.1, norm)
    found, penalty = files.apply(reg, *paths), reg.apply(x, g)
    np.testing.assert_equal(found.penalty, penalty)
    np.testing.assert_array_equal(np.load(paths[1]), g)


def test_bytes_and_passes_are_counted(tmp_path):
    x = values_of(1000, np.float32)
    paths = saved(tmp_path, x=x, g=x)
    steps = []

    def note(step, done, whole):
        steps.append((step, done, whole))

    found = files.penalty(ActivityRegularization.l1(0.1), paths[0], progress=note)
    assert (found.bytes, found.passes) == (4000, 1)
    assert steps == [("sum", 2000, 4000), ("sum", 4000, 4000)]
    steps.clear()
    found = files.apply(ActivityRegularization.l2(0.1), *paths, progress=note)
    assert (found.bytes, found.passes) == (16_000, 2)
    assert steps[1:3] == [("sum", 4000, 4000), ("update", 3000, 12_000)]
    assert len(steps) == 6


# Memory.

LIMITED = """
import resource, sys
from actreg_dispatch import ActivityRegularization, files
from actreg_dispatch.cli import main
folder, files.BLOCK_BYTES, files.WINDOW_BYTES = sys.argv[1], 16 * 2**20, 64 * 2**20
reg = {norm: ActivityRegularization(0.5, norm) for norm in ("l1", "l2", "l2_squared")}
for norm in reg:  # imports, compiles, starts threads
    files.penalty(reg[norm], folder + "/small.npy")
    files.apply(reg[norm], folder + "/small.npy", folder + "/copy.npy")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 80 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    import mmap
    mmap.mmap(open(folder + "/x.npy").fileno(), 0, access=mmap.ACCESS_READ)
except OSError:
    print("the whole file does not fit")
for norm in reg:
    print(files.penalty(reg[norm], folder + "/x.npy").penalty)
for norm in reg:
    print(files.apply(reg[norm], folder + "/x.npy", folder + "/g.npy").penalty)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit that holds")
def test_files_larger_than_the_limit_on_memory(tmp_path, python):
    """Five blocks of room, with all else a quarter of what it is, and files of five times that."""
    size = 25 * (1 << 22) + 5  # 420 MB of float32, most of it holes
    for name in ("x", "g"):
        array = np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float32, shape=(size,))
        array[:: size // 40] = 3.0
        del array
    small = values_of(300_000, np.float32)
    saved(tmp_path, small=small, copy=small)
    # As blocks of 64 MiB do on their own, these shall go back to the system when they are freed.
    told = python("-c", LIMITED, str(tmp_path), MALLOC_MMAP_THRESHOLD_="1000000").stdout.split("\n")
    marks = -(-size // (size // 40))
    assert told[0] == "the whole file does not fit"
    alone = [0.5 * 3 * marks, 0.5 * np.float32(math.sqrt(9 * marks)), 0.5 * 9 * marks]
    assert [np.float32(line) for line in told[1:7]] == [np.float32(p) for p in 2 * alone]
    with (tmp_path / "g.npy").open("rb") as file:  # 3 + λ + λ·3/‖x‖ + 2λ·3, where it is not 0
        root = np.float32(math.sqrt(9 * marks))
        expected = np.float32(3.5) + np.float32(1.5) / root + np.float32(3)
        for index in (0, size // 40 * 17, size // 40 * 40):
            file.seek(128 + 4 * index)
            here, beside = np.frombuffer(file.read(8) + bytes(4), np.float32)[:2]
            assert here == expected
            assert beside == 0


# What is refused, before anything is written.


def _with_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(800)


def _npz():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("x.npy", b"")
    return stream.getvalue()


def _pickled():
    stream = io.BytesIO()
    np.save(stream, np.array([Trap()], object), allow_pickle=True)
    return stream.getvalue()


class Trap:
    """Ends the test run if it is unpickled."""

    def __reduce__(self):
        return os._exit, (3,)


BROKEN = {
    "empty": (b"", "not a .npy file"),
    "text": (b"1.0, 2.0", "not a .npy file"),
    "npz": (_npz(), "not a .npy file"),
    "magic alone": (b"\x93NUMPY", "broken .npy header"),
    "version": (b"\x93NUMPY\x09\x00" + bytes(90), "format (9, 0) is unknown"),
    "header cut off": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{", "broken .npy header"),
    "no literal": (_with_header("{'descr': __import__('os')}"), "broken .npy header"),
    "too long a header": (
        _with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (9,)}" + " " * 20_000),
        "broken .npy header",
    ),
    "negative": (
        _with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}"),
        "is negative",
    ),
    "too many bytes": (
        _with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2**62, 9)}").replace(
            b"2**62", b"%d" % 2**62
        ),
        "broken .npy header",
    ),
    "data cut off": (
        _with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (201,)}"),
        "were cut off; write them anew",
    ),
    "integers": (
        _with_header("{'descr': '<i4', 'fortran_order': False, 'shape': (200,)}"),
        "have dtype int32; convert them to float16, float32 or float64",
    ),
    "structured": (
        _with_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (200,)}"),
        "convert them",
    ),
    "bfloat16 unasked": (
        _with_header("{'descr': '<V2', 'fortran_order': False, 'shape': (200,)}"),
        "--dtype bfloat16",
    ),
    "pickled": (_pickled(), "never loaded"),
}


@pytest.mark.parametrize("place", ["activations", "gradients"])
@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(tmp_path, content, message, place):
    paths = saved(tmp_path, x=np.ones(200, np.float32), g=np.ones(200, np.float32))
    paths[place == "gradients"].write_bytes(content)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(files.FilesError, match=re.escape(message)) as refusal:
        files.apply(ActivityRegularization.l1(0.1), *paths)
    assert str(refusal.value).startswith(place)
    assert_untouched(paths, before)


FITTING = np.ones((20, 30), np.float32)

UNFIT = {
    "shape": ({"g": np.ones((30, 20), np.float32)}, {}, "shape (30, 20) but activations"),
    "dtype": ({"g": np.ones((20, 30))}, {}, "dtype float64 but activations"),
    "order": (
        {"g": np.asfortranarray(FITTING)},
        {},
        "in F order but activations in C order; save what is in F order again",
    ),
    "asked bfloat16": ({}, {"dtype": "bfloat16"}, "leave it out"),
    "asked nonsense": ({"x": np.zeros(9, "V2")}, {"dtype": "f2"}, "leave it out"),
    "lam": ({}, {"lam": 1e300}, "lam=1e+300 is too large"),
    "scale": ({}, {"scale": "x"}, "scale='x'"),
    "resume": ({}, {"resume": True}, "leave --resume out"),
}


@pytest.mark.parametrize(("changed", "options", "message"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_refused(tmp_path, changed, options, message):
    paths = saved(tmp_path, **{"x": FITTING, "g": FITTING} | changed)
    before = [path.read_bytes() for path in paths]
    options = dict(options)
    reg = ActivityRegularization(options.pop("lam", 0.1))
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        files.apply(reg, *paths, **options)
    assert_untouched(paths, before)


def test_a_backend_that_cannot_run_is_refused(tmp_path, registered, capsys):
    registry.register_backend("broken", lambda: 1 / 0, array_type="numpy.ndarray")
    paths = saved(tmp_path, x=FITTING, g=FITTING)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(SystemExit) as stop:
        main(["apply", *map(str, paths), "--lam", "1", "--backend", "broken"])
    assert stop.value.code == 2
    assert "backend 'broken' cannot run here: ZeroDivisionError" in capsys.readouterr().err
    assert_untouched(paths, before)


def test_batches_need_an_axis(tmp_path):
    path = saved(tmp_path, x=np.ones(()))[0]
    with pytest.raises(ValueError, match="have no axes, but reduction='batch' divides"):
        files.penalty(ActivityRegularization(0.1, reduction="batch"), path)


@pytest.mark.parametrize("link", ["same", "symbolic", "hard"])
def test_one_file_for_both_is_refused(tmp_path, link):
    (path,) = saved(tmp_path, x=FITTING)
    other = path if link == "same" else tmp_path / "link.npy"
    if link == "symbolic":
        other.symlink_to(path)
    elif link == "hard":
        other.hardlink_to(path)
    before = path.read_bytes()
    with pytest.raises(files.FilesError, match="are one file"):
        files.apply(ActivityRegularization.l1(0.1), path, other)
    assert_untouched([path], [before])


def test_read_only_and_missing_files_are_refused(tmp_path):
    reg, paths = ActivityRegularization.l1(0.1), saved(tmp_path, x=FITTING, g=FITTING)
    before = [path.read_bytes() for path in paths]
    paths[1].chmod(0o444)
    with pytest.raises(files.FilesError, match="are read-only; make them writable"):
        files.apply(reg, *paths)
    assert_untouched(paths, before)
    with pytest.raises(files.FilesError, match="do not exist; name a"):
        files.penalty(reg, tmp_path / "none.npy")
    with pytest.raises(files.FilesError, match=r"gradients to begin with are numpy\.zeros_like"):
        files.apply(reg, paths[0], tmp_path / "none.npy")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(files.FilesError, match="not a regular file"):  # which would block
        files.penalty(reg, tmp_path / "pipe")


# Weights.


def weights_of(shape, dtype, order="C", seed=3):
    """Return weights, or a mask, of which some are 0."""
    rng = np.random.default_rng(seed)
    weights = np.asarray(rng.random(shape) * (rng.random(shape) < 0.7))
    return np.asarray(weights.astype(dtype), order=order)


WEIGHTS = {
    "full": (9, 7, 13),
    "last": (13,),
    "middle": (7, 1),
    "first": (9, 1, 1),
    "first and last": (9, 1, 13),
    "0-d": (),
}
weight_shapes = pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)


@weight_shapes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32, foreign", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_weights_have_the_bits_of_exact_arithmetic(tmp_path, shape, dtype, order):
    dtype, asked = DTYPES[dtype], ASKED.get(DTYPES[dtype])
    native = dtype.newbyteorder("=")
    x, g = (np.asarray(values_of((9, 7, 13), dtype, seed), order=order) for seed in (1, 2))
    for kind in (dtype, np.dtype(np.float64 if native == np.float64 else np.float32), bool):
        w = weights_of(shape, kind, order)
        for norm in (ActivityNorm.L1, ActivityNorm.L2):
            penalty, updated = exact_result(
                x.astype(native), g.astype(native), norm, 0.1, scale=3.0, weights=w
            )
            paths = saved(tmp_path, x=x, g=g, w=w)
            reg = ActivityRegularization(0.1, norm)
            alone = files.penalty(reg, paths[0], weights=paths[2], dtype=asked)
            found = files.apply(reg, *paths[:2], weights=paths[2], scale=3.0, dtype=asked)
            assert alone.penalty.tobytes() == found.penalty.tobytes() == penalty.tobytes()
            left = np.load(paths[1]).view(dtype).astype(native)
            assert left.tobytes() == updated.tobytes()


@weight_shapes
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("reduction", ["mean", "batch", -1, (0, 2), (2, 1)])
def test_reductions_divide_by_what_a_mask_keeps(tmp_path, norm, shape, order, reduction):
    x, g = (np.asarray(values_of((9, 7, 13), np.float64, seed), order=order) for seed in (1, 2))
    reg = ActivityRegularization(0.1, norm, reduction=reduction)
    mask = weights_of(shape, bool, order)
    if mask.ndim:
        mask[..., :5] = mask[:1] = False
    for w in (mask, weights_of(shape, np.float64, order)):
        paths = saved(tmp_path, x=x, g=g, w=w)
        found = files.apply(reg, *paths[:2], weights=paths[2])
        updated = g.copy(order="K")
        assert reg.apply(x, updated, weights=w) == found.penalty
        assert files.penalty(reg, paths[0], weights=paths[2]).penalty == found.penalty
        assert_same_bits(np.load(paths[1]), updated)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1, 700, 1)])
def test_weights_of_empty_and_zero_dimensional_files(tmp_path, shape):
    x, g = np.full(shape, -2.0), np.ones(shape)
    for w in (np.full(shape, 0.5), np.asarray(True), np.ones(shape, bool)):
        paths = saved(tmp_path, x=x, g=g, w=w)
        for reduction in ("sum", "mean"):
            reg, before = ActivityRegularization(0.1, "l2", reduction=reduction), np.load(paths[1])
            found = files.apply(reg, *paths[:2], weights=paths[2])
            assert found.penalty == reg.apply(x, before, weights=w)
            assert_same_bits(np.load(paths[1]), before)


def test_what_weighs_nothing_is_left_out_whatever_it_is(tmp_path):
    x, mask = values_of(700, np.float32), weights_of(700, bool)
    x[~mask] = math.nan
    paths = saved(tmp_path, x=x, g=np.ones_like(x), w=mask)
    penalty, updated = exact_result(x, np.ones_like(x), ActivityNorm.L2, 0.1, weights=mask)
    found = files.apply(ActivityRegularization.l2(0.1), *paths[:2], weights=paths[2])
    assert found.penalty == penalty
    assert_same_bits(np.load(paths[1]), updated)


def test_bytes_and_passes_of_weights_are_counted(tmp_path):
    x, steps = values_of(1000, np.float32), []
    weights = {"w": weights_of(1000, np.float32), "m": weights_of(1000, bool)}
    paths = saved(tmp_path, x=x, g=x, **weights, one=np.ones(1, np.float32))

    def found(function, *paths, reg="l1", **options):
        steps.clear()
        reg = ActivityRegularization(0.1, reg, reduction="mean")
        result = function(reg, *paths, progress=lambda step, *_: steps.append(step), **options)
        return result.bytes, result.passes, list(dict.fromkeys(steps))

    x, g, w, m, one = paths
    assert found(files.apply, x, g, weights=one) == (12_004, 1, ["update"])
    assert found(files.penalty, x, weights=w) == (8000, 1, ["sum"])
    assert found(files.penalty, x, weights=m) == (6000, 1, ["weights", "sum"])
    assert found(files.apply, x, g, weights=w) == (20_000, 1, ["weights", "update"])
    assert found(files.apply, x, g, weights=w, reg="l2") == (24_000, 2, ["sum", "update"])


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("shape", "place"),
    [((9, 7, 13), (8, 2, 5)), ((7, 13), (2, 5)), ((9, 1, 1), (8, 0, 0)), ((), ())],
    ids=str,
)
def test_bad_weights_are_refused_before_anything_is_written(tmp_path, norm, bad, shape, place):
    for order in "CF":
        x, w = np.asarray(values_of((9, 7, 13), np.float32), order=order), np.ones(shape, "f4")
        w[place] = bad
        paths = saved(tmp_path, x=x, g=x, w=np.asarray(w, order=order))
        before, reg = [path.read_bytes() for path in paths], ActivityRegularization(0.1, norm)
        message = rf"weights .*w.npy have {bad} at {re.escape(str(place))}.*use 0 to leave"
        with pytest.raises(files.FilesError, match=message):
            files.penalty(reg, paths[0], weights=paths[2])
        with pytest.raises(files.FilesError, match=message):
            files.apply(reg, *paths[:2], weights=paths[2])
        assert_untouched(paths, before)


UNFIT_WEIGHTS = {
    "shape": (np.ones(20, np.float32), {}, "shape (20,), which does not broadcast to (20, 30)"),
    "axes": (np.ones((1, 20, 30), np.float32), {}, "does not broadcast"),
    "dtype": (np.ones(30), {}, "weights have dtype float64, but activations have float32"),
    "integers": (np.ones(30, int), {}, "int64; convert them to bool, float16, float32 or float64"),
    "order": (np.asfortranarray(FITTING), {}, "stored in F order but activations in C order"),
    "one file": (None, {}, "are one file; the update would change its own input"),
    "pickled": (_pickled(), {}, "never loaded"),
}


@pytest.mark.parametrize(("w", "options", "message"), UNFIT_WEIGHTS.values(), ids=UNFIT_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(tmp_path, w, options, message):
    paths = saved(tmp_path, x=FITTING, g=FITTING, w=FITTING)
    if isinstance(w, bytes):
        paths[2].write_bytes(w)
    elif w is not None:
        np.save(paths[2], w)
    before = [path.read_bytes() for path in paths]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as refusal:
        files.apply(
            ActivityRegularization(0.1), *paths[:2], weights=paths[1 if w is None else 2], **options
        )
    assert str(refusal.value).startswith("weights")
    assert_untouched(paths, before)


def test_weights_are_a_path_to_a_file_that_exists(tmp_path):
    (path,) = saved(tmp_path, x=FITTING)
    reg = ActivityRegularization(0.1)
    with pytest.raises(TypeError, match=r"weights are a ndarray; pass the path of a \.npy file"):
        files.penalty(reg, path, weights=FITTING)
    with pytest.raises(files.FilesError, match=r"weights .*none\.npy' do not exist; name a"):
        files.penalty(reg, path, weights=tmp_path / "none.npy")


def test_activations_may_weigh_themselves(tmp_path):
    (path,) = saved(tmp_path, x=np.full(300, 2.0))
    assert files.penalty(ActivityRegularization.l1(0.5), path, weights=path).penalty == 600


# Interruption.


class Died(BaseException):
    """Stands for a process that is no more."""


REAL_WRITE, REAL_SYNC = stores.write_fully, stores.sync


class Mortal:
    """Dies at the ``last`` write to a file or wait for the disk, in the middle of it.

    With ``power`` to fail, any of the writes that nobody waited for may be lost.
    """

    def __init__(self, monkeypatch, last, error=Died, power=None):
        self.last, self.error, self.count = last, error, 0
        self.power, self.in_flight = power, []
        for module in (stores, journal):
            monkeypatch.setattr(module, "write_fully", self.write)
            monkeypatch.setattr(module, "sync", self.sync)

    def _is_last(self):
        self.count += 1
        return self.count == self.last

    def _die(self):
        for path, place, former in reversed(self.in_flight):
            if self.power and self.power.random() < 0.5:
                with path.open("r+b") as file:
                    file.seek(place)
                    file.write(former)
        raise self.error

    def write(self, file, place, values):
        last, path = self._is_last(), Path(file.name)
        with path.open("rb") as before:
            before.seek(place)
            self.in_flight.append((path, place, before.read(len(values))))
        REAL_WRITE(file, place, memoryview(values)[: len(values) // 2] if last else values)
        if last:
            self._die()

    def sync(self, number):
        if self._is_last():
            self._die()
        inode = os.fstat(number).st_ino
        self.in_flight = [w for w in self.in_flight if w[0].stat().st_ino != inode]
        REAL_SYNC(number)


@norms
@pytest.mark.parametrize("seed", [None, 1], ids=["the process", "the power"])
def test_resumed_wherever_it_died_the_bits_are_the_same(tmp_path, norm, seed, monkeypatch):
    """Die at every write and every wait for the disk, and once more in the run that resumes."""
    power = None if seed is None else random.Random(seed)
    x, g = values_of((50, 23), np.float32, 1), values_of((50, 23), np.float32, 2)
    penalty, updated = exact_result(x, g, norm, 0.1, scale=-2.0)
    reg = ActivityRegularization(0.1, norm)
    deaths = 0
    for last in range(1, 1000):
        paths = saved(tmp_path, x=x, g=g)
        mortal = Mortal(monkeypatch, last, power=power)
        try:
            found = files.apply(reg, *paths, scale=-2.0)
            break
        except Died:
            deaths += 1
        if not files.journal_of(paths[1]).exists():
            assert_same_bits(np.load(paths[1]), g)
            assert last <= 2  # while the journal was made
            continue
        for again in (last % 7 + 1, 0):
            mortal = Mortal(monkeypatch, again, power=power)
            try:
                found = files.apply(reg, *paths, scale=-2.0, resume=True)
            except Died:
                assert again
                continue
            assert found.penalty == penalty
            if not again:
                break
            assert mortal.count < again  # there was less left to do
            break
        assert_same_bits(np.load(paths[1]), updated)
        assert not files.journal_of(paths[1]).exists()
    assert found.penalty == penalty
    assert_same_bits(np.load(paths[1]), updated)
    assert deaths == mortal.count > 20


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_full_disk_says_that_it_can_be_resumed(tmp_path, monkeypatch, capsys, norm):
    x, g = values_of(900, np.float64, 1), values_of(900, np.float64, 2)
    paths = saved(tmp_path, x=x, g=g)
    command = ["apply", *map(str, paths), "--lam", "0.1", "--norm", norm]
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        Mortal(patch, 15, full)
        assert main(command) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "g.npy are updated in part" in told
    assert "--resume" in told
    assert told.count("\n") == 1
    assert main([*command, "--resume"]) == 0
    assert_same_bits(np.load(paths[1]), exact_result(x, g, ActivityNorm(norm), 0.1)[1])


def test_no_room_for_the_journal_leaves_all_untouched(tmp_path, monkeypatch, capsys):
    paths = saved(tmp_path, x=FITTING, g=FITTING)
    before = [path.read_bytes() for path in paths]

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert main(["apply", *map(str, paths), "--lam", "0.1"]) == 2
    told = capsys.readouterr().err
    assert "actreg-journal cannot be written: No space left on device" in told
    assert "gradients, which are untouched" in told
    assert_untouched(paths, before)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """Two files, of which the second is updated in part."""
    x, g = values_of(900, np.float32, 1), values_of(900, np.float32, 2)
    paths = saved(tmp_path, x=x, g=g)
    with monkeypatch.context() as patch:
        Mortal(patch, 12)
        with pytest.raises(Died):
            files.apply(ActivityRegularization.l1(0.5), *paths)
    assert files.journal_of(paths[1]).exists()
    assert np.load(paths[1]).tobytes() != g.tobytes()
    return paths


def test_a_journal_keeps_another_update_away(interrupted):
    before = interrupted[1].read_bytes()
    link = interrupted[1].with_name("link.npy")
    link.symlink_to(interrupted[1])
    assert files.journal_of(str(link)) == files.journal_of(interrupted[1])
    for gradients in (interrupted[1], link):
        with pytest.raises(files.FilesError, match="go on with it by the same command and --res"):
            files.apply(ActivityRegularization.l1(0.5), interrupted[0], gradients)
    assert interrupted[1].read_bytes() == before
    files.apply(ActivityRegularization.l1(0.5), interrupted[0], link, resume=True)
    assert not files.journal_of(interrupted[1]).exists()


@pytest.mark.parametrize(
    ("reg", "options", "named"),
    [
        (ActivityRegularization.l1(0.25), {}, "lam 0.5, not 0.25"),
        (ActivityRegularization.l2_squared(0.5), {}, "norm l1, not l2_squared"),
        (ActivityRegularization.l1(0.5, reduction="mean"), {}, "reduction 'sum', not 'mean'"),
        (ActivityRegularization.l1(0.5), {"scale": 2.0}, "scale 1.0, not 2.0"),
    ],
)
def test_another_update_is_not_resumed(interrupted, reg, options, named):
    before = interrupted[1].read_bytes()
    with pytest.raises(files.FilesError, match=named):
        files.apply(reg, *interrupted, resume=True, **options)
    assert interrupted[1].read_bytes() == before


@pytest.mark.parametrize("changed", [0, 1])
def test_other_files_are_not_resumed(interrupted, changed):
    path = interrupted[changed]
    content = path.read_bytes()
    path.rename(f"{path}.keeps-the-inode")
    path.write_bytes(content)
    with pytest.raises(files.FilesError, match=("activations", "gradients")[changed]):
        files.apply(ActivityRegularization.l1(0.5), *interrupted, resume=True)
    assert path.read_bytes() == content


def test_a_resumed_run_keeps_to_the_blocks_of_the_first(interrupted, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 3000)
    files.apply(ActivityRegularization.l1(0.5), *interrupted, resume=True)
    x, g = values_of(900, np.float32, 1), values_of(900, np.float32, 2)
    assert_same_bits(np.load(interrupted[1]), exact_result(x, g, ActivityNorm.L1, 0.5)[1])


@pytest.mark.parametrize("content", [b"not ours", b'{"crc32": 5, "of": "{' + bytes(20_000)])
def test_what_is_no_complete_journal_is_left_alone(tmp_path, content):
    paths = saved(tmp_path, x=FITTING, g=FITTING)
    path = files.journal_of(paths[1])
    path.write_bytes(content)
    before = paths[1].read_bytes()
    for resume, message in ((True, "is no complete journal"), (False, "exists: an update")):
        with pytest.raises(files.FilesError, match=message):
            files.apply(ActivityRegularization.l1(0.1), *paths, resume=resume)
    assert (path.read_bytes(), paths[1].read_bytes()) == (content, before)


@pytest.mark.parametrize("content", [b"", bytes(20_000)])
def test_stopped_while_it_made_the_journal_it_starts_anew(tmp_path, content):
    paths = saved(tmp_path, x=FITTING, g=FITTING)
    files.journal_of(paths[1]).write_bytes(content)
    with pytest.raises(files.FilesError, match="exists: an update"):
        files.apply(ActivityRegularization.l1(0.5), *paths)
    files.apply(ActivityRegularization.l1(0.5), *paths, resume=True)
    assert_same_bits(np.load(paths[1]), FITTING + np.float32(0.5))
    assert not files.journal_of(paths[1]).exists()


def test_a_run_under_way_is_not_resumed(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    paths = saved(tmp_path, x=FITTING, g=FITTING)
    reg, refused = ActivityRegularization.l1(0.1), []

    def meanwhile(step, done, whole):
        for resume in (True, False):
            with pytest.raises(files.FilesError, match=r"in use|exists") as refusal:
                files.apply(reg, *paths, resume=resume)
            refused.append(str(refusal.value))

    assert fcntl.flock
    files.apply(reg, *paths, progress=meanwhile)
    assert len(refused) == 6
    assert_same_bits(np.load(paths[1]), FITTING + np.float32(0.1))


CHILD = """
import sys, time
from actreg_dispatch import files
from actreg_dispatch.cli import main
files.BLOCK_BYTES = files.WINDOW_BYTES = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def start(paths, *options, block=1000):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(block), "apply", *map(str, paths), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


def last_change(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_killed_at_random_and_resumed(tmp_path, norm):
    """Kill -9, up to four times over, then let it finish."""
    rng = random.Random(norm)
    x, g = values_of(200_000, np.float32, 1), values_of(200_000, np.float32, 2)
    paths = saved(tmp_path, x=x, g=g)
    options, path, kills = ["--lam", "0.1", "--norm", norm], files.journal_of(paths[1]), 0
    for _ in range(4):
        process = start(paths, *options)
        wait_for(path, process)
        if kills:  # the journal is there from the start, so wait until it is written to
            former = last_change(path)
            while process.poll() is None and last_change(path) == former:
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += path.exists()
        if path.exists():
            options[4:] = ["--resume"]
    assert kills >= 1
    if path.exists():
        done = start(paths, *options, "--json")
        told, problems = done.communicate()
        assert done.returncode == 0, problems
        expected = ActivityRegularization(0.1, norm).penalty(x)
        assert json.loads(told)["penalty"] == float(expected)
    updated = g.copy()
    ActivityRegularization(0.1, norm).apply(x, updated)
    assert_same_bits(np.load(paths[1]), updated)
    assert not path.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_between_blocks_and_say_so(tmp_path, number, status):
    x, g = values_of(200_000, np.float32, 1), values_of(200_000, np.float32, 2)
    paths = saved(tmp_path, x=x, g=g)
    options, path = ("--lam", "0.1", "--norm", "l2_squared"), files.journal_of(paths[1])
    process = start(paths, *options)
    wait_for(path, process)
    process.send_signal(number)
    told, problems = process.communicate()
    assert process.returncode == status, problems
    assert told == ""
    assert problems.startswith("actreg: interrupted; ")
    assert "g.npy are updated in part: go on by the same command and --resume" in problems
    assert "Traceback" not in problems
    done = start(paths, *options, "--resume")
    done.communicate()
    assert done.returncode == 0
    updated = g.copy()
    ActivityRegularization.l2_squared(0.1).apply(x, updated)
    assert_same_bits(np.load(paths[1]), updated)


def test_a_signal_before_the_first_block_leaves_all_untouched(tmp_path, monkeypatch, capsys):
    x, g = values_of(900, np.float32, 1), values_of(900, np.float32, 2)
    paths = saved(tmp_path, x=x, g=g)
    before = [path.read_bytes() for path in paths]
    original = stores.NpyFile.read

    def read(self, region):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, region)

    monkeypatch.setattr(stores.NpyFile, "read", read)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["apply", *map(str, paths), "--lam", "1", "--norm", "l2"]) == 130
    assert "g.npy are untouched" in capsys.readouterr().err
    assert_untouched(paths, before)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["penalty", str(paths[0]), "--lam", "1"]) == 130
    assert capsys.readouterr().err == "actreg: interrupted\n"


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("shape", [(50, 23), (50, 1)])
def test_with_weights_it_is_resumed_wherever_it_died(tmp_path, norm, shape, monkeypatch):
    x, g = values_of((50, 23), np.float32, 1), values_of((50, 23), np.float32, 2)
    w, reg, deaths = weights_of(shape, np.float32), ActivityRegularization(0.1, norm), 0
    penalty, updated = exact_result(x, g, ActivityNorm(norm), 0.1, weights=w)
    for last in range(3, 1000):
        *paths, weights = saved(tmp_path, x=x, g=g, w=w)
        Mortal(monkeypatch, last)
        try:
            found = files.apply(reg, *paths, weights=weights)
        except Died:
            deaths += 1
            Mortal(monkeypatch, 0)
            found = files.apply(reg, *paths, weights=weights, resume=True)
        else:
            break
        assert found.penalty == penalty
        assert_same_bits(np.load(paths[1]), updated)
    assert deaths > 15


def test_other_weights_are_not_resumed(tmp_path, monkeypatch):
    x, g = values_of(900, np.float32, 1), values_of(900, np.float32, 2)
    w = weights_of(900, np.float32)
    *paths, weights, same = saved(tmp_path, x=x, g=g, w=w, same=w)
    with monkeypatch.context() as patch:
        Mortal(patch, 12)
        with pytest.raises(Died):
            files.apply(ActivityRegularization(0.5), *paths, weights=weights)
    before = paths[1].read_bytes()
    for other in (None, same, paths[0]):
        with pytest.raises(files.FilesError, match=r"is of an update with weights \{.*, not "):
            files.apply(ActivityRegularization(0.5), *paths, weights=other, resume=True)
    assert paths[1].read_bytes() == before
    files.apply(ActivityRegularization(0.5), *paths, weights=weights, resume=True)
    assert_same_bits(np.load(paths[1]), exact_result(x, g, ActivityNorm.L1, 0.5, weights=w)[1])


# The command line.


def test_a_line_or_json(tmp_path, capsys):
    x, g = values_of((20, 45), np.float32, 1), values_of((20, 45), np.float32, 2)
    paths = [str(path) for path in saved(tmp_path, x=x, g=g)]
    penalty = ActivityRegularization.l2(1e-3, epsilon=0.5).penalty(x)
    options = ["--lam", "1e-3", "--norm", "l2", "--epsilon", "0.5"]
    assert main(["penalty", paths[0], *options]) == 0
    line = capsys.readouterr().out
    first = f"penalty {float(penalty)!r} (l2, λ = 0.001, 900 float32)\n3.6 kB in "
    assert line.startswith(first)
    assert line.endswith(" s, start-up included; backend numba\n")
    assert main(["apply", *paths, *options, "--scale", "2", "--json", "--backend", "numpy"]) == 0
    streams = capsys.readouterr()
    told = json.loads(streams.out)
    assert streams.err == ""  # no bar where there is no terminal
    assert told.pop("seconds") > 0
    assert told == {
        "penalty": float(penalty),
        "penalty_hex": float(penalty).hex(),
        "norm": "l2",
        "lam": 0.001,
        "epsilon": 0.5,
        "reduction": "sum",
        "scale": 2.0,
        "dtype": "float32",
        "shape": [20, 45],
        "elements": 900,
        "bytes": 14_400,
        "passes": 2,
        "backend": "numpy",
    }
    assert main(["apply", *paths, *options]) == 0
    assert f"gradient added to {paths[1]}\n" in capsys.readouterr().out


def test_weights_are_told(tmp_path, capsys):
    x, w = values_of((20, 45), np.float32, 1), weights_of((20, 1), bool)
    x_path, g_path, w_path = map(str, saved(tmp_path, x=x, g=x, w=w))
    penalty = ActivityRegularization.l1(0.5, reduction="mean").penalty(x, weights=w)
    options = ["--lam", "0.5", "--reduction", "mean", "--weights", w_path]
    assert main(["penalty", x_path, *options]) == 0
    line = f"penalty {float(penalty)!r} (l1, λ = 0.5, 900 float32, weights {w_path})\n"
    assert capsys.readouterr().out.startswith(line)
    assert main(["apply", x_path, g_path, *options, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["penalty"], told["weights"]) == (float(penalty), w_path)
    np.save(w_path, np.full((20, 1), -1.0, np.float32))
    assert main(["apply", x_path, g_path, *options]) == 2
    assert "have -1.0 at (0, 0), but must be finite and >= 0" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_json_has_no_infinity(tmp_path, capsys, bad):
    paths = [str(path) for path in saved(tmp_path, x=np.array([float(bad)]), g=np.zeros(1))]

    def refuse(constant):
        raise AssertionError(constant)

    for command in (["penalty", paths[0]], ["apply", *paths, "--scale", bad]):
        assert main([*command, "--lam", "1", "--json"]) == 0
        told = json.loads(capsys.readouterr().out, parse_constant=refuse)
        assert (told["penalty"], told["penalty_hex"]) == (None, bad)


def test_mistakes_are_one_line(tmp_path, capsys):
    (path,) = map(str, saved(tmp_path, x=FITTING))
    for arguments, message in (
        (["--lam", "-1"], "lam=-1.0 is out of range"),
        (["--lam", "1", "--epsilon", "1"], "epsilon=1.0 has no meaning for norm 'l1'"),
        (["--lam", "1", "--dtype", "bfloat16"], "leave it out"),
        (["--lam", "1", "--backend", "bogus"], "backend='bogus' names no backend"),
    ):
        assert main(["penalty", path, *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("actreg: ")
        assert message in told
        assert told.count("\n") == 1


def test_what_cannot_report_progress_is_refused_before_anything_is_written(tmp_path):
    x, g = saved(tmp_path, x=np.ones(9), g=np.zeros(9))
    with pytest.raises(TypeError, match=r"progress=3 cannot be called; pass a function"):
        files.apply(ActivityRegularization(0.5), x, g, progress=3)
    assert not np.load(g).any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.npy", "x.npy"]


class _PathLike:
    """Something with a path of any type."""

    def __init__(self, path):
        self._path = path

    def __fspath__(self):
        return self._path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, "x.npy", "g.npy"), "reg=0.1 is of type float; pass an ActivityRegularization"),
        ((ActivityRegularization(1), None, "g.npy"), "activations are a NoneType; pass the path"),
        ((ActivityRegularization(1), b"x.npy", "g.npy"), "activations are a bytes; pass the path"),
        ((ActivityRegularization(1), _PathLike(b"x"), "g"), "activations are a _PathLike; pass"),
        ((ActivityRegularization(1), _PathLike(3), "g"), "activations are a _PathLike; pass the"),
        ((ActivityRegularization(1), "x.npy", 3), "gradients are a int; pass the path"),
    ],
)
def test_arguments_of_wrong_types_are_refused(arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        files.apply(*arguments)
    if "gradients" not in message:
        with pytest.raises(TypeError, match=re.escape(message)):
            files.penalty(*arguments[:2])


class _Named(str):
    """A string that is printed as another, as a member of an enumeration is."""

    def __str__(self):
        return "another.npy"


def test_a_path_is_its_characters_however_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, x=np.ones(9), another=np.ones(9))
    reg = ActivityRegularization.l1(1)
    assert files.penalty(reg, _Named("x.npy")).penalty == 9
    with pytest.raises(files.FilesError, match=re.escape("activations x.npy and gradients x.npy")):
        files.apply(reg, _Named("x.npy"), "x.npy")
    assert np.array_equal(np.load("x.npy"), np.ones(9))


@pytest.mark.parametrize("path", ["", "x.npy/", "x.npy/more"])
def test_paths_of_nothing_are_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, x=np.ones(9))
    message = re.escape(f"activations {path!r} do not exist; name a .npy file or a Zarr store")
    with pytest.raises(files.FilesError, match=message):
        files.penalty(ActivityRegularization.l1(1), path)


def test_headers_are_parsed_once_and_files_are_not_mixed_up(tmp_path):
    reg, path = ActivityRegularization.l1(1), tmp_path / "x.npy"
    misses = []
    for values in (np.ones(8, np.float32), np.full(8, 3, np.float32), np.ones(4), np.ones((2, 2))):
        np.save(path, values)
        assert files.penalty(reg, path).penalty == values.sum()
        misses.append(stores._parsed.cache_info().misses)
    assert misses[1] == misses[0]


def test_no_more_of_a_file_is_read_than_a_header_may_have(tmp_path, monkeypatch):
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(1 << 20))
    sizes, read_fully = [], stores.read_fully

    def read(file, place, size):
        sizes.append(size)
        return read_fully(file, place, size)

    monkeypatch.setattr(stores, "read_fully", read)
    with pytest.raises(files.FilesError, match="broken"):
        files.penalty(ActivityRegularization.l1(1), path)
    assert 0 < max(sizes) <= 1 << 16


def test_the_bar_has_a_rate_on_a_terminal(tmp_path):
    (path,) = saved(tmp_path, x=values_of(900_000, np.float32))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "40000", "penalty", str(path), "--lam", "1", "--json"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    told, _ = process.communicate()
    assert json.loads(told)["elements"] == 900_000
    assert b"sum" in seen
    assert re.search(rb"[kMG]B/s", seen)
    assert b"0:00:00" in seen


def test_npy_files_take_no_extras(tmp_path, python):
    (path,) = saved(tmp_path, x=np.ones(300_000, np.float32))
    code = """
import sys
sys.modules["rich"] = sys.modules["zarr"] = None
from actreg_dispatch.cli import main
main(["penalty", sys.argv[1], "--lam", "1"])
"""
    assert python("-c", code, str(path)).stdout.startswith("penalty 300000.0 (l1, λ = 1.0, ")


# Zarr.


@pytest.fixture
def zarr():
    if sys.version_info < (3, 11):
        pytest.skip("Zarr 3 needs Python 3.11")
    return importlib.import_module("zarr")


def stored(zarr, path, values, chunks, **options):
    array = zarr.create_array(
        path, shape=values.shape, chunks=chunks, dtype=values.dtype, **options
    )
    array[...] = values
    return path


LAYOUTS = {
    "format 3": ({"chunks": (7, 9)}, {"chunks": (7, 9)}),
    "format 2": ({"chunks": (7, 9), "zarr_format": 2}, {"chunks": (7, 9), "zarr_format": 2}),
    "unequal": ({"chunks": (11, 40)}, {"chunks": (4, 8), "zarr_format": 2}),
    "shards": ({"chunks": (5, 5)}, {"chunks": (3, 2), "shards": (12, 8)}),
    "one chunk": ({"chunks": (31, 41)}, {"chunks": (31, 41)}),
}


@pytest.mark.parametrize("norm", [ActivityNorm.L1, ActivityNorm.L2])  # of one pass and of two
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f4", "<f8"])
def test_zarr_has_the_bits_of_exact_arithmetic(zarr, tmp_path, norm, layout, dtype):
    x, g = (values_of((31, 41), dtype, seed) for seed in (1, 2))
    penalty, updated = exact_result(x, g, norm, 0.1)
    paths = [
        stored(zarr, tmp_path / name, values, **options)
        for name, values, options in zip("xg", (x, g), layout, strict=True)
    ]
    reg = ActivityRegularization(0.1, norm)
    assert files.penalty(reg, paths[0]).penalty == penalty
    assert files.apply(reg, *paths).penalty == penalty
    native = np.dtype(dtype).newbyteorder("=")  # format 3 keeps the byte order to itself
    for path, expected in ((paths[0], x), (paths[1], updated)):
        left = zarr.open_array(path, mode="r")[...]
        assert_same_bits(left.astype(native), expected.astype(native))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g", "x"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_chunks_are_on_disk_before_the_next_block(zarr, tmp_path, layout, monkeypatch):
    x, synced = values_of((31, 41), np.float32), set()
    paths = [
        stored(zarr, tmp_path / name, x, **options)
        for name, options in zip("xg", layout, strict=True)
    ]
    original = stores.sync_path
    monkeypatch.setattr(stores, "sync_path", lambda path: (synced.add(path), original(path)))
    files.apply(ActivityRegularization.l1(0.1), *paths)
    chunks = {path for path in paths[1].rglob("*") if path.is_file()}
    chunks = {path for path in chunks if path.name[0] != "." and path.name != "zarr.json"}
    assert len(chunks) >= 1
    assert synced == chunks | {path.parent for path in chunks}


@norms
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_empty_and_zero_dimensional_zarr(zarr, tmp_path, norm, shape):
    x, g = np.full(shape, -2.0), np.ones(shape)
    chunks = tuple(max(1, length) for length in shape)
    paths = [stored(zarr, tmp_path / name, v, chunks) for name, v in (("x", x), ("g", g))]
    penalty, updated = exact_result(x, g, norm, 0.1)
    assert files.apply(ActivityRegularization(0.1, norm), *paths).penalty == penalty
    assert_same_bits(np.asarray(zarr.open_array(paths[1], mode="r")[...]), updated)


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.5, math.nan])
def test_chunks_of_nothing_but_the_fill_value(zarr, tmp_path, fill):
    x = np.zeros(3000, np.float32)
    x[5], x[2000] = 1.0, -1.0
    g = np.full(3000, -0.0, np.float32)
    paths = [tmp_path / "x", tmp_path / "g"]
    stored(zarr, paths[0], x, (100,))
    array = zarr.create_array(
        paths[1],
        shape=(3000,),
        chunks=(100,),
        dtype="f4",
        fill_value=fill,
        config={"write_empty_chunks": True},
    )
    array[...] = g
    penalty, updated = exact_result(x, g, ActivityNorm.L1, 1.5)
    assert files.apply(ActivityRegularization.l1(1.5), *paths).penalty == penalty
    assert_same_bits(zarr.open_array(paths[1], mode="r")[...], updated)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_zarr_is_resumed_wherever_it_died(zarr, tmp_path, norm, sharded, monkeypatch):
    x, g = (values_of((31, 41), np.float32, seed) for seed in (1, 2))
    penalty, updated = exact_result(x, g, ActivityNorm(norm), 0.1)
    reg, deaths = ActivityRegularization(0.1, norm), 0
    original = stores.ZarrArray.write
    for last in range(1, 40):
        paths = [tmp_path / f"x{last}", tmp_path / f"g{last}"]
        stored(zarr, paths[0], x, (10, 10))
        stored(zarr, paths[1], g, (5, 5), shards=(10, 10) if sharded else None)
        count = 0

        def write(self, region, values, last=last):
            nonlocal count
            count += 1
            if count == last:  # some of the chunks are written, some not
                half = (slice(region[0].start, (region[0].start + region[0].stop) // 2), region[1])
                original(self, half, values[: half[0].stop - half[0].start])
                raise Died
            original(self, region, values)

        monkeypatch.setattr(stores.ZarrArray, "write", write)
        try:
            files.apply(reg, *paths)
            break
        except Died:
            deaths += 1
        assert files.journal_of(paths[1]).exists()
        assert files.apply(reg, *paths, resume=True).penalty == penalty
        assert_same_bits(zarr.open_array(paths[1], mode="r")[...], updated)
        assert not files.journal_of(paths[1]).exists()
    assert deaths == count > 4


def test_bfloat16_in_zarr(zarr, tmp_path):
    x = values_of(700, ml_dtypes.bfloat16)
    raw, paths = x.view("V2"), [tmp_path / "x", tmp_path / "g"]
    for path in paths:
        array = zarr.create_array(path, shape=(700,), chunks=(90,), dtype="V2", zarr_format=2)
        array[...] = raw
    penalty, updated = exact_result(x, x, ActivityNorm.L1, 0.5)
    found = files.apply(ActivityRegularization.l1(0.5), *paths, dtype="bfloat16")
    assert found.penalty == penalty
    left = zarr.open_array(paths[1], mode="r")[...]
    assert left.tobytes() == updated.tobytes()


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(31, 41), (41,), (31, 1), ()], ids=str)
def test_weights_in_zarr(zarr, tmp_path, norm, layout, shape):
    x, g = (values_of((31, 41), np.float32, seed) for seed in (1, 2))
    for w in (weights_of(shape, np.float32), weights_of(shape, bool)):
        paths = [
            stored(zarr, tmp_path / name, values, overwrite=True, **options)
            for name, values, options in zip("xg", (x, g), layout, strict=True)
        ]
        weights = stored(zarr, tmp_path / "w", w, w.shape and (6,) * w.ndim, overwrite=True)
        for reduction in ("sum", "mean", 1):
            reg = ActivityRegularization(0.1, norm, reduction=reduction)
            found = files.penalty(reg, paths[0], weights=weights)
            assert found.penalty == reg.penalty(x, weights=w)
        before = g.copy()
        assert files.apply(reg, *paths, weights=weights).penalty == reg.apply(x, before, weights=w)
        assert_same_bits(zarr.open_array(paths[1], mode="r")[...], before)


def test_weights_that_broadcast_may_be_of_another_format_and_others_not(zarr, tmp_path):
    x = values_of((31, 41), np.float32)
    w, reg = weights_of((31, 41), np.float32), ActivityRegularization(0.1)
    npy, full, row = saved(tmp_path, x=x, w=w, row=w[0])
    inside = [
        stored(zarr, tmp_path / name, v, (6,) * v.ndim) for name, v in (("x", x), ("w", w[0]))
    ]
    assert files.penalty(reg, inside[0], weights=row).penalty == reg.penalty(x, weights=w[0])
    assert files.penalty(reg, npy, weights=inside[1]).penalty == reg.penalty(x, weights=w[0])
    with pytest.raises(files.FilesError, match=r"activations .* are a Zarr store but weights .* a"):
        files.penalty(reg, inside[0], weights=full)


def test_bad_weights_in_zarr_are_refused_before_anything_is_written(zarr, tmp_path):
    x, w = values_of((31, 41), np.float32), np.ones((31, 41), np.float32)
    w[30, 7] = -1
    paths = [
        stored(zarr, tmp_path / name, v, (10, 10)) for name, v in zip("xgw", (x, x, w), strict=True)
    ]
    for norm in ("l1", "l2"):
        with pytest.raises(files.FilesError, match=r"have -1.0 at \(30, 7\), but must be finite"):
            files.apply(ActivityRegularization(0.1, norm), *paths[:2], weights=paths[2])
    assert_same_bits(zarr.open_array(paths[1], mode="r")[...], x)


def test_folders_that_do_not_fit_are_refused(zarr, tmp_path):
    reg = ActivityRegularization.l1(0.1)
    (npy,) = saved(tmp_path, n=np.ones(100))
    path = stored(zarr, tmp_path / "x", np.ones(100), (10,))
    ints = stored(zarr, tmp_path / "i", np.ones(100, np.int32), (10,))
    zarr.create_group(tmp_path / "group")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{")
    for arguments, message in (
        ([path, npy], "are a Zarr store but gradients"),
        ([path, path], "are one file"),
        ([ints, path], "have dtype int32"),
        ([tmp_path / "folder", path], "without a Zarr array"),
        ([tmp_path / "group", path], "cannot be read as a Zarr array"),
        ([tmp_path / "broken", path], "cannot be read as a Zarr array"),
    ):
        with pytest.raises(files.FilesError, match=message):
            files.apply(reg, *arguments)
    assert (zarr.open_array(path, mode="r")[...] == 1).all()


def test_without_zarr_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert main(["penalty", str(tmp_path), "--lam", "1"]) == 2
    assert "python -m pip install 'actreg-dispatch[files]'" in capsys.readouterr().err
