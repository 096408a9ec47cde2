"""What ptxas makes of the CUDA kernels: how many registers, what is in memory, how long a loop is.

It needs no GPU. Registers and the instructions of a loop are what the speed of a kernel depends on
that a device in software cannot show.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_frames import COMPUTE, KERNELS, compiled, require_headers, source_of

from actreg_dispatch.backends.cuda.passes import LOADS
from actreg_dispatch.backends.cuda.source import THREADS

ARCHITECTURES, LOOPS_ON = (75, 80, 90, 120), (80, 90)
PACKAGES = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}
FAST = re.compile("actreg_(batch_|rows_)?((sum|apply)_certified|update|count)")
LIMIT = 64  # registers of a thread: so four blocks fit on a multiprocessor
# A pass over rows keeps elements and their places: three blocks fit, two of float64.
ROWS_LIMIT = {"float16": 80, "bfloat16": 80, "float": 80, "double": 128}
# Those that the package can launch. Exact sums of 16-bit dtypes differ from those of float32 in the
# load alone, and what evaluates them knows float32 and float64 only.
PACKAGED = {
    dtype: {
        name: kernel
        for name, kernel in KERNELS.items()
        if not name.endswith(("_foreign", "_bare"))
        and (dtype in ("float", "double") or FAST.match(name))
    }
    for dtype in COMPUTE
}
BYTES = {"float16": 2, "bfloat16": 2, "float": 4, "double": 8}


class Function(NamedTuple):
    """A kernel for a dtype and a layout, as compiled."""

    kernel: str
    dtype: str
    layout: str


class Resources(NamedTuple):
    """What a function takes, according to ptxas."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


class MachineCode(NamedTuple):
    """What is known of the functions for an architecture."""

    resources: dict[Function, Resources]
    ptx: dict[Function, str]
    sass: dict[Function, str]


def tool(name):
    """Return the path of a program of the CUDA toolkit, or None.

    What pip installed is asked for first: it is as new as NVRTC, or was meant to be.
    """
    site = Path(sysconfig.get_path("purelib"), "nvidia")
    packaged = [*site.glob(f"cu*/bin/{name}"), *site.glob(f"*/bin/{name}")]
    return str(packaged[-1]) if packaged else shutil.which(name)


@pytest.fixture
def machine_code(request, tmp_path):
    """Return what makes the machine code for an architecture, of all dtypes at once."""
    missing = [
        f"no {name}: python -m pip install {package}"
        for name, package in PACKAGES.items()
        if tool(name) is None
    ]
    require_headers(request, *missing)
    return functools.partial(assembled, folder=tmp_path)


MACHINE_CODE = {}  # of architectures; three tests look at one


def assembled(architecture, folder):
    """Return the machine code for an architecture, which is made once."""
    if architecture not in MACHINE_CODE:
        source, cubin = folder / "kernels.ptx", folder / "kernels.cubin"
        ptx = compiled(source_of(PACKAGED), architecture)
        source.write_text(ptx)
        log = output_of("ptxas", "-v", f"-arch=sm_{architecture}", source, "-o", cubin)
        sass = output_of("nvdisasm", "-c", cubin) if architecture in LOOPS_ON else ""
        MACHINE_CODE[architecture] = MachineCode(resources_in(log), ptx_in(ptx), sass_in(sass))
    return MACHINE_CODE[architecture]


def output_of(name, *arguments):
    ran = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.fail(f"{name}: {ran.stderr}")
    return ran.stdout + ran.stderr


def function_of(mangled):
    """Return the function of a mangled name, or None where it is none of a kernel's own."""
    match = re.match(r"_ZN\d+of_([a-z]+\d*?)\d\d(actreg_\w+?)(?:5|7)(dense|strided)E", mangled)
    return Function(match[2], match[1], match[3]) if match else None


def resources_in(log):
    sizes = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    entry = rf"Compiling entry function '(\w+)'.*?{sizes}.*?Used (\d+) registers"
    return {
        function_of(name): Resources(int(registers), *map(int, spilled))
        for name, *spilled, registers in re.findall(entry, log, re.DOTALL)
    }


def ptx_in(text):
    entry = r"\.entry (\w+)\(.*?^\{(.*?)^\}\s*(?!\s*//\s*end inline asm)(?=//|\.|\Z)"
    bodies = re.findall(entry, text, re.DOTALL | re.MULTILINE)
    return {function_of(name): body for name, body in bodies}


def sass_in(text):
    sections = re.split(r"^\.text\.(\w+):$", text, flags=re.MULTILINE)[1:]
    named = zip(map(function_of, sections[::2]), sections[1::2], strict=True)
    return {function: body for function, body in named if function}


def ptx_instructions(body):
    """Return labels and instructions, without declarations, comments and pragmas."""
    lines = re.sub(r"//.*", "", body).replace(";", ";\n").splitlines()
    lines = [line.strip(" \t;").lstrip("{ \t") for line in lines]
    return [line for line in lines if line and not re.match(r"[}.]", line)]


def sass_instructions(body):
    """Return labels and instructions, without addresses; and without NOP."""
    lines = re.findall(r"^(\.\w+:)|/\*\w{4,}\*/\s+(.*?)\s*;", body, re.MULTILINE)
    return [label or line for label, line in lines if line != "NOP"]


def main_loop(lines):
    """Return the instructions of the innermost loop with the most loads of 16 bytes.

    A loop goes from its label to the last branch back to it.
    """
    labels = {line.rstrip(":"): place for place, line in enumerate(lines) if line.endswith(":")}
    ends = {}
    for place, line in enumerate(lines):
        for target in re.findall(r"\bbra\S*\s.*?([.$]\w+)", line, re.IGNORECASE):
            if labels.get(target, place) < place:
                ends[labels[target]] = place
    inner = [
        (first, last)
        for first, last in ends.items()
        if not any(first < other and end < last for other, end in ends.items())
    ]
    loops = [[x for x in lines[first : last + 1] if x[-1] != ":"] for first, last in inner]
    return max(loops, key=lambda loop: (sum(map(is_vector_load, loop)), len(loop)))


def is_vector_load(line):
    """Return whether an instruction, of PTX or SASS, loads 16 bytes of global memory."""
    return re.search(r"\bLDG\.E\.128|\bld\.global\.(nc\.)?(v4\..32|v2\..64)", line) is not None


def weight(instruction):
    """Return what an instruction of PTX is expected to be in SASS, in instructions."""
    name = re.sub(r"^@!?%\w+\s+", "", instruction).split()[0]
    if re.match("mov|abs|neg", name):  # the same register, and an operand's sign, by another name
        return 0
    if name.startswith("div.rn"):  # the quick path: a reciprocal, and steps of Newton's
        return 24 if name.endswith("64") else 12
    if re.match("(max|min).[su]64", name):  # two comparisons, and two halves to choose
        return 4
    if re.match(r"setp\.ne\.s32\s+%p\d+, %r\d+, 0$", instruction):  # which masking tells, too
        return 0
    # Integers have 32 bits in SASS. Masks for signs leave the lower half as it is.
    return 2 if re.match(r"(add|sub|mul|mad|shl|shr|setp|selp)\..*[bsu]64$", name) else 1


def vectors_of(function):
    """Return how many vectors a thread loads at once of each array."""
    return LOADS // 2 if "_update_" in function.kernel else LOADS


def loops_of(code):
    """Return the main loops in PTX and SASS of the kernels that take one array by vectors."""
    return {
        function: (main_loop(ptx_instructions(ptx)), main_loop(sass_instructions(sass)))
        for function, ptx, sass in ((each, code.ptx[each], code.sass[each]) for each in code.sass)
        if "vectors" in function.kernel and "_batch_" not in function.kernel
    }


def of(architectures):
    """Run a test for each architecture, all tests of one in one process, which compiles it once."""
    groups = [(each, pytest.mark.xdist_group(f"sm_{each}")) for each in architectures]
    parameters = [pytest.param(each, marks=group) for each, group in groups]
    return pytest.mark.parametrize("architecture", parameters)


@of(ARCHITECTURES)
def test_no_kernel_spills_registers(machine_code, architecture):
    resources = machine_code(architecture).resources
    assert {(each.dtype, each.kernel) for each in resources} == {
        (dtype, name) for dtype, kernels in PACKAGED.items() for name in kernels
    }
    assert not {
        each: found for each, found in resources.items() if found.spill_stores or found.spill_loads
    }
    # The words of a superaccumulator after carries are an array, which one thread indexes.
    in_memory = {each.kernel for each, found in resources.items() if found.stack}
    finishing = re.compile("_finish_|_rows_(sum|apply)_l2")
    assert in_memory == {name for name in PACKAGED["float"] if finishing.search(name)}


@of(ARCHITECTURES)
def test_four_blocks_of_a_fast_pass_fit_on_a_multiprocessor(machine_code, architecture):
    """A multiprocessor has 65,536 registers."""
    assert LIMIT * THREADS * 4 == 65536
    resources = machine_code(architecture).resources
    assert not {
        each: found.registers
        for each, found in resources.items()
        if FAST.match(each.kernel)
        and found.registers > (ROWS_LIMIT[each.dtype] if "_rows_" in each.kernel else LIMIT)
    }


@of(LOOPS_ON)
def test_vectors_are_loaded_and_stored_whole_and_nothing_else_is(machine_code, architecture):
    for function, (_, loop) in loops_of(machine_code(architecture)).items():
        # ULDC and LDC read kernel arguments.
        memory = Counter(re.findall(r"\b(?:LD|ST|ATOM|RED)(?!C)[A-Z]*(?:\.\w+)*", "\n".join(loop)))
        updates = not re.search("sum|count", function.kernel)
        vectors = vectors_of(function)
        expected = {"LDG.E.128": vectors * (1 + updates), "STG.E.128": vectors * updates}
        assert memory == Counter({name: n for name, n in expected.items() if n}), function


@of(LOOPS_ON)
def test_a_loop_is_as_long_as_its_arithmetic_says(machine_code, architecture, record_property):
    for function, (ptx, sass) in loops_of(machine_code(architecture)).items():
        if function.dtype == "bfloat16":  # of which some of these GPUs have no instructions
            continue
        elements = vectors_of(function) * 16 // BYTES[function.dtype]
        expected, found = sum(map(weight, ptx)) / elements, len(sass) / elements
        record_property(f"{function.kernel} {function.dtype}", (len(ptx) / elements, found))
        assert found == pytest.approx(expected, rel=0.15), function
