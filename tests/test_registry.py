"""Which backend serves a call, and what is said when none can."""

from __future__ import annotations

import ast
import asyncio
import graphlib
import logging
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from supported import DTYPES, dtypes

import actreg_dispatch
from actreg_dispatch import (
    ActivityRegularization,
    Backend,
    BackendError,
    BackendUnavailableError,
    MixedArraysError,
    UnknownBackendError,
    available_backends,
    get_backend,
    register_backend,
    registry,
    use_backend,
)
from actreg_dispatch.backends import reference
from actreg_dispatch.validation import check_gradients


@pytest.fixture
def served_by(caplog):
    """Say which backend served a call, from the debug log."""
    caplog.set_level(logging.DEBUG, logger="actreg_dispatch")

    def name(values=None, **options):
        caplog.clear()
        values = np.ones(3) if values is None else values
        assert float(ActivityRegularization(0.5, **options).penalty(values)) == 1.5
        (record,) = caplog.records
        return record.getMessage().split()[1]

    return name


class Toy(Backend):
    """A backend on an array type of its own: lists of floats in a wrapper."""

    name = "toy"
    dtypes = frozenset({np.dtype(np.float64)})

    def penalty(self, activations, norm, constants):
        return constants.lam[0] * sum(map(abs, activations.values))

    partial_sum = apply = add_gradient = None  # which no test calls


class ToyArray:
    dtype = np.dtype(np.float64)

    def __init__(self, *values):
        self.values = values


@pytest.fixture
def toy(registered, monkeypatch):
    """Register the toy backend for arrays of a library called ``toylib``."""
    monkeypatch.setitem(sys.modules, "toylib", types.SimpleNamespace(Array=ToyArray))
    register_backend("toy", Toy, array_type="toylib.Array", install="Build one")


def test_numpy_arrays_go_to_numba(served_by):
    assert served_by() == "numba"


@pytest.mark.parametrize("value", ["", "auto", " AUTO "])
def test_the_environment_may_leave_it_to_the_array_type(served_by, monkeypatch, value):
    monkeypatch.setenv("ACTREG_BACKEND", value)
    assert served_by() == "numba"


@pytest.mark.parametrize("value", ["numpy", " NumPy\n", "NUMPY"])
def test_the_environment_variable_is_read_at_call_time(served_by, monkeypatch, value):
    assert served_by() == "numba"
    monkeypatch.setenv("ACTREG_BACKEND", value)
    assert served_by() == "numpy"
    monkeypatch.delenv("ACTREG_BACKEND")
    assert served_by() == "numba"


def test_argument_over_context_over_environment(served_by, monkeypatch):
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    with use_backend("numpy"):
        assert served_by() == "numpy"
        assert served_by(backend="numba") == "numba"
        assert served_by(backend="auto") == "numba"
        with use_backend("auto"):
            assert served_by() == "numba"
        assert served_by() == "numpy"
    with pytest.raises(UnknownBackendError):
        ActivityRegularization(0.5).penalty(np.ones(3))


def test_the_context_ends_with_its_block_even_after_an_error(served_by):
    with pytest.raises(KeyError), use_backend("numpy"):
        raise KeyError
    assert served_by() == "numba"


def test_a_wrong_name_is_told_before_the_block():
    with pytest.raises(UnknownBackendError, match="use_backend"):
        use_backend("bogus")


def test_the_context_belongs_to_its_thread_and_task(served_by):
    names = []
    with use_backend("numpy"):
        thread = threading.Thread(target=lambda: names.append(registry.requested()[0]))
        thread.start()
        thread.join()

    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0.001)
            return registry.requested()[0]

    async def both():
        return await asyncio.gather(task("numpy"), task("numba"))

    assert names == ["auto"]
    assert asyncio.run(both()) == ["numpy", "numba"]


def test_an_unknown_name_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("ACTREG_BACKEND", "bogus")
    gradients = np.zeros(3)
    with pytest.raises(
        UnknownBackendError, match=r"ACTREG_BACKEND='bogus' .*: auto, numba, numpy, cupy"
    ):
        ActivityRegularization(0.5).apply(np.ones(3), gradients)
    assert not gradients.any()


@pytest.mark.parametrize("name", ["bogus", 3, None, ["numpy"], np.ones(2)])
def test_an_unknown_name_is_refused_everywhere(name):
    with pytest.raises(UnknownBackendError, match=r"name=.* use one of: auto, numba, numpy, cupy"):
        get_backend(name)
    with pytest.raises(UnknownBackendError, match="use_backend"), use_backend(name):
        pass


def test_auto_is_no_single_backend():
    with pytest.raises(UnknownBackendError, match=r"name='auto' .* use one of: numba, numpy, cupy"):
        get_backend("auto")


def test_the_errors_are_of_the_built_in_kinds():
    assert issubclass(UnknownBackendError, ValueError)
    assert issubclass(BackendUnavailableError, RuntimeError)
    assert issubclass(MixedArraysError, TypeError)
    for error in (UnknownBackendError, BackendUnavailableError, MixedArraysError):
        assert issubclass(error, BackendError)


def test_get_backend_returns_the_loaded_backend():
    assert get_backend(" NumPy ") is reference.BACKEND
    for name in available_backends():
        assert get_backend(name).name == name
        assert get_backend(name).is_available()


def test_the_dependencies_are_available():
    assert {"numpy", "numba"} <= set(available_backends())


@pytest.mark.parametrize("name", ["", "auto", "Toy", " toy", "numpy", 3])
def test_a_bad_or_taken_name_cannot_be_registered(registered, name):
    with pytest.raises(ValueError, match=f"name={name!r}"):
        register_backend(name, Toy, array_type="toylib.Array")


def test_an_array_type_is_a_dotted_name(registered):
    with pytest.raises(ValueError, match="array_type='Array' is no dotted name"):
        register_backend("toy", Toy, array_type="Array")


def test_a_choice_that_is_gone_is_told_at_the_call(registered):
    register_backend("toy", Toy, array_type="toylib.Array")
    reg = ActivityRegularization(0.5, backend="toy")
    del registry._ENTRIES["toy"]
    with pytest.raises(UnknownBackendError, match=r"backend='toy' names no backend; use one of"):
        reg.penalty(np.ones(3))


def test_an_explicit_choice_is_not_replaced_by_another(registered):
    class Narrow(reference.ReferenceBackend):
        dtypes = {np.dtype(np.float32)}  # noqa: RUF012

    register_backend("narrow", Narrow, array_type="numpy.ndarray")
    reg = ActivityRegularization(0.5, backend="narrow")
    assert reg.penalty(np.ones(3, np.float32)) == 1.5
    with pytest.raises(TypeError, match=r"backend 'narrow' does not take float64.*another backend"):
        reg.penalty(np.ones(3))


def test_the_nearest_base_class_decides(registered, monkeypatch, served_by):
    class Special(np.ndarray):
        pass

    monkeypatch.setitem(sys.modules, "speciallib", types.SimpleNamespace(Array=Special))
    special = np.ones(3).view(Special)
    assert served_by(special) == "numba"

    class SpecialBackend(reference.ReferenceBackend):
        name = "special"

    register_backend("special", SpecialBackend, array_type="speciallib.Array")
    assert served_by(special) == "special"
    assert served_by() == "numba"


def test_a_registered_backend_serves_its_array_type(toy, served_by):
    assert "toy" in available_backends()
    assert served_by(ToyArray(1.0, -2.0)) == "toy"
    with pytest.raises(TypeError, match=r"gradient for a toylib.Array cannot be made; pass.* out"):
        ActivityRegularization(0.5).penalty_and_gradient(ToyArray(1.0))


def test_a_backend_may_register_another_while_it_loads(registered):
    def load():
        register_backend("second", Toy, array_type="toylib.Array")
        return Toy()

    register_backend("toy", load, array_type="toylib.Array")
    assert "toy" in available_backends()
    assert "second" in available_backends()


def test_a_registered_backend_is_loaded_once_and_only_when_asked_for(registered):
    loads = []

    def load():
        loads.append(1)
        return Toy()

    register_backend("toy", load, array_type="toylib.Array")
    assert not loads
    assert get_backend("toy") is get_backend("toy")
    assert loads == [1]


def test_data_of_a_library_that_cannot_move_it_stays(toy):
    with pytest.raises(TypeError, match=r"toylib\.Array cannot be moved.*choose a backend"):
        ActivityRegularization(0.5, backend="numpy").penalty(ToyArray(1.0))


def test_mixed_arguments_are_refused(toy):
    gradients = np.zeros(3)
    for pair in ((ToyArray(1.0), gradients), (gradients, ToyArray(1.0))):
        with pytest.raises(MixedArraysError, match=r"activations are .* gradients are .* move one"):
            ActivityRegularization(0.5).apply(*pair)
    assert not gradients.any()


def test_an_unavailable_backend_says_why_and_what_to_do(toy, monkeypatch):
    monkeypatch.setattr(Toy, "unavailable_because", "No toys here")
    expected = r"backend 'toy' cannot run here: No toys here\. Build one"
    assert "toy" not in available_backends()
    with pytest.raises(BackendUnavailableError, match=f"the array type: {expected}"):
        ActivityRegularization(0.5).penalty(ToyArray(1.0))
    with pytest.raises(BackendUnavailableError, match=f"name='toy': {expected}"):
        get_backend("toy")
    monkeypatch.setenv("ACTREG_BACKEND", "toy")
    with pytest.raises(BackendUnavailableError, match=rf"ACTREG_BACKEND='toy': {expected}"):
        ActivityRegularization(0.5).penalty(np.ones(3))


def test_a_backend_that_is_not_one_is_told(registered):
    register_backend("toy", lambda: np, array_type="toylib.Array")
    with pytest.raises(BackendUnavailableError, match=r"not derived from actreg_dispatch\.Backend"):
        get_backend("toy")


def test_a_backend_that_does_not_load_leaves_the_others_alone(registered, served_by):
    def load():
        raise OSError("libtoy.so is missing")

    register_backend("toy", load, array_type="toylib.Array")
    with pytest.raises(BackendUnavailableError, match=r"OSError: libtoy\.so is missing"):
        get_backend("toy")
    assert served_by() == "numba"


def test_the_reference_steps_in_for_a_numba_that_does_not_load(registered, served_by):
    def load():
        raise ImportError("no LLVM")

    registry._ENTRIES["numba"] = registry._Entry(load, "numpy.ndarray", "Reinstall it")
    assert served_by() == "numpy"
    with pytest.raises(BackendUnavailableError, match=r"no LLVM\. Reinstall it"):
        ActivityRegularization(0.5, backend="numba").penalty(np.ones(3))


def test_foreign_byte_orders_are_computed_by_the_reference(served_by):
    swapped = np.ones(3).astype(np.dtype(np.float64).newbyteorder("S"))
    assert served_by(swapped) == "numpy"
    assert served_by(swapped, backend="numba") == "numpy"


def test_a_subclass_is_recognized_by_its_base(served_by):
    class Plain(np.ndarray):
        pass

    assert served_by(np.ones(3).view(Plain)) == "numba"


def test_every_decision_is_logged_at_debug_level(caplog, monkeypatch):
    ActivityRegularization(0.5).penalty(np.ones(3))
    assert not caplog.records
    caplog.set_level(logging.DEBUG, logger="actreg_dispatch")
    monkeypatch.setenv("ACTREG_BACKEND", "numpy")
    ActivityRegularization(0.5).penalty(np.ones(3))
    (record,) = caplog.records
    assert record.name == "actreg_dispatch"
    assert record.getMessage() == (
        "backend numpy for numpy.ndarray float64 by the environment variable ACTREG_BACKEND='numpy'"
    )


def test_cupy_without_a_device_says_what_to_install(python):
    """CuPy may be missing, or there without a driver; both have a remedy."""
    code = """
import sys
import numpy as np
from actreg_dispatch import ActivityRegularization
sys.modules["cupy"] = None  # an import raises ImportError, as where it is not installed
try:
    ActivityRegularization(0.5).penalty(np.ones(3))
except RuntimeError as error:
    print(type(error).__name__, error)
"""
    told = python("-c", code, ACTREG_BACKEND="cupy").stdout
    assert told.startswith("BackendUnavailableError the environment variable ACTREG_BACKEND='cupy'")
    assert "python -m pip install cupy-cuda13x" in told


def test_importing_the_package_imports_no_array_library(python):
    code = """
import sys
import actreg_dispatch
heavy = {"numba", "cupy", "dask", "jax", "torch", "matplotlib", "sklearn", "rich", "ml_dtypes"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python("-c", code).stdout == "[]\n"


def test_a_call_imports_only_the_backend_that_serves_it(python):
    code = """
import sys
import numpy as np
from actreg_dispatch import ActivityRegularization
reg = ActivityRegularization.l1(0.5, backend="numpy")
reg.apply(np.ones(3), np.zeros(3))
print(sorted({"numba", "cupy", "dask", "jax", "torch"} & set(sys.modules)))
reg = ActivityRegularization.l1(0.5)
reg.apply(np.ones(3), np.zeros(3))
print(sorted({"numba", "cupy", "dask", "jax", "torch"} & set(sys.modules)))
"""
    assert python("-c", code).stdout == "[]\n['numba']\n"


def test_modules_do_not_import_each_other_in_a_circle():
    """Imports inside of functions included; what the registry's tables name is loaded by name."""
    package = Path(actreg_dispatch.__file__).parent
    imports = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        imports[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text("utf-8"))
    for name, tree in imports.items():
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports by a relative name"
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & imports.keys()
                found.update(inner or {node.module})
        imports[name] = found & imports.keys()
    assert "actreg_dispatch.registry" in imports["actreg_dispatch.torch.memory"]
    in_a_function = "actreg_dispatch.runtime.subnormals"
    assert in_a_function in imports["actreg_dispatch.jax.callbacks"]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules


def test_all_public_names_exist_and_are_documented():
    for name in actreg_dispatch.__all__:
        assert getattr(actreg_dispatch, name).__doc__


# Data moves on an explicit choice only.

norms = pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])


@norms
@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype(">f4"), np.dtype(">f8")])
def test_numpy_arrays_travel_to_the_device_and_back(cupy, monkeypatch, norm, dtype):
    activations = np.arange(24.0).reshape(4, 6).astype(dtype)[::-1, ::2]
    room = np.ones((4, 6), dtype)
    gradients, expected = room[:, ::2], np.ones((4, 3), dtype)
    penalty = ActivityRegularization(0.1, norm, backend="numpy").apply(activations, expected)
    monkeypatch.setenv("ACTREG_BACKEND", "cupy")
    reg = ActivityRegularization(0.1, norm)
    for found in (reg.apply(activations, gradients), reg.penalty(activations)):
        assert type(found) is type(penalty)
        assert found == penalty
    assert (gradients == expected).all()
    assert (room[:, 1::2] == 1).all()


@norms
@dtypes
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_cupy_arrays_travel_to_the_host_and_back(cupy, norm, name, dtype):
    values, expected = np.arange(24.0).reshape(4, 6).astype(dtype), np.ones((4, 3), dtype)
    penalty = ActivityRegularization(0.1, norm, backend=name).apply(values[::-1, ::2], expected)
    activations = cupy.asarray(values)[::-1, ::2]
    room = cupy.ones((4, 6), dtype)
    with use_backend(name):
        reg = ActivityRegularization(0.1, norm)
        for found in (reg.apply(activations, room[:, ::2]), reg.penalty(activations)):
            assert type(found) is cupy.ndarray
            assert found.shape == ()
            assert found.device == activations.device
            assert found.get() == penalty
    assert (room[:, ::2].get() == expected).all()
    assert (room[:, 1::2].get() == 1).all()


def test_arrays_on_two_devices_are_refused(cupy):
    gradients = cupy.zeros(3)
    elsewhere = types.SimpleNamespace(dtype=gradients.dtype, shape=(3,), device="<CUDA Device 1>")
    with pytest.raises(ValueError, match=r"gradients are on .* 0> but activations on .* 1>; move"):
        check_gradients(elsewhere, gradients, "cupy.ndarray")


def test_a_dtype_that_the_device_does_not_take_is_told(cupy, monkeypatch, registered):
    monkeypatch.setattr(get_backend("cupy"), "dtypes", {np.dtype(np.float32)})
    with pytest.raises(TypeError, match=r"backend 'cupy' does not take float16.*convert them"):
        ActivityRegularization(0.5).apply(cupy.ones(3, "f2"), cupy.ones(3, "f2"))


def test_cupy_arrays_stay_on_the_device_unasked(cupy, served_by):
    assert served_by(cupy.ones(3)) == "cupy"


def test_numpy_and_cupy_do_not_mix(cupy):
    for pair in ((np.ones(3), cupy.zeros(3)), (cupy.ones(3), np.zeros(3))):
        with pytest.raises(MixedArraysError, match=r"numpy\.ndarray|cupy\.ndarray"):
            ActivityRegularization(0.5, backend="cupy").apply(*pair)


def test_a_move_is_logged(cupy, caplog):
    caplog.set_level(logging.DEBUG, logger="actreg_dispatch")
    ActivityRegularization(0.5, backend="cupy").penalty(np.ones(3))
    assert caplog.records[-1].getMessage().endswith("moved from numpy.ndarray to cupy.ndarray")
