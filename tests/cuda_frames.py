"""The kernels' code in functions as CuPy would write them, and what NVRTC makes of those.

CuPy generates the source of a kernel only once a device is there. Here it needs none.
"""

from __future__ import annotations

from pathlib import Path

import pytest

cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
pathfinder = pytest.importorskip("cuda.pathfinder", reason="this CuPy is older than 14")

from cupy.cuda import nvrtc  # noqa: E402

from actreg_dispatch.backends.cuda.counting import counting_kernels  # noqa: E402
from actreg_dispatch.backends.cuda.kernels import kernels_of  # noqa: E402
from actreg_dispatch.backends.cuda.row_norms import row_kernels_of  # noqa: E402
from actreg_dispatch.backends.cuda.source import OPTIONS, preamble  # noqa: E402
from actreg_dispatch.norms import NORMS, Norm, signed, sqrt  # noqa: E402

CUDA_HEADERS = pathfinder.find_nvidia_header_directory("cudart")

FOREIGN = Norm(  # every function there is, two λ, a guard
    "foreign",
    terms=(1, 2),
    penalty=lambda lam, s: lam[0] * s[0] - lam[1] / sqrt(s[1]),
    coefficients=lambda lam, s: (s[0] - lam[1], -sqrt(s[1]), signed(s[0], lam[0])),
    gradient=lambda x, lam, c: signed(c[0], x) + (c[1] - x) / sqrt(c[2] * lam[1]) - (-lam[0]),
    guard=lambda s, epsilon: s[0] * s[1] > epsilon,
)
BARE = Norm(  # a guard, but no coefficients
    "bare",
    terms=(1,),
    penalty=lambda lam, s: lam[0] * s[0],
    gradient=lambda x, lam, c: signed(lam[0], x),
    guard=lambda s, epsilon: s[0] > epsilon,
)
KERNELS = {
    kernel.name: kernel
    for norm in (*NORMS.values(), FOREIGN, BARE)
    for batch in (False, True)
    for kernel in kernels_of(norm, batch=batch)
    if kernel is not None
}
KERNELS |= {kernel.name: kernel for kernel in counting_kernels(weighted=False)}
KERNELS |= {kernel.name: kernel for kernel in row_kernels_of(NORMS["l2"])}
COMPUTE = {"float16": "float", "bfloat16": "float", "float": "float", "double": "double"}


def require_headers(request, *others_missing):
    """Skip a test where something to compile with is missing, or fail it where CuPy is required."""
    missing = list(others_missing)
    if CUDA_HEADERS is None:
        missing.append("no CUDA headers: python -m pip install 'cupy-cuda13x[ctk]'")
    if missing:
        required = "cupy" in request.config.getoption("--require-backend")
        (pytest.fail if required else pytest.skip)("; ".join(missing))


def is_scalar(parameter):
    return not parameter.raw and parameter.is_const and parameter.name != "word"


def declared(parameter, strided):
    """Return the C++ declaration of a kernel's parameter; arrays have two dimensions."""
    const = "const " if parameter.is_const else ""
    if is_scalar(parameter):
        return f"{const}{parameter.ctype} {parameter.name}"
    prefix = "" if parameter.raw else "_raw_"
    return f"{const}CArray<{parameter.ctype}, 2, {int(not strided)}, 1> {prefix}{parameter.name}"


def loaded(parameter, index):
    """Return the C++ statement that names an element of a parameter that is not raw."""
    if parameter.raw or is_scalar(parameter):
        return ""
    const = "const " if parameter.is_const else ""
    return f"{const}{parameter.ctype}& {parameter.name} = _raw_{parameter.name}[{index}];"


def framed(kernel, strided):
    """Return a kernel function with the code of ``kernel``."""
    parameters = kernel.in_params + kernel.out_params
    arguments = ", ".join(declared(parameter, strided) for parameter in parameters)
    views = " ".join(loaded(parameter, "i") for parameter in parameters)
    if isinstance(kernel, cupy.ElementwiseKernel):
        body = f"""
            {kernel.kwargs.get("loop_prep", "")};
            CUPY_FOR(i, _ind.size()) {{ _ind.set(i); {views} {kernel.operation}; }}"""
    else:
        body = f"""
            const ptrdiff_t i = threadIdx.x, _i = blockIdx.x, _J = i; {views}
            {kernel.reduce_type} a = {kernel.identity}, b = {kernel.map_expr};
            a = ({kernel.reduce_expr});
            ({kernel.post_map_expr});"""
    name = "strided" if strided else "dense"
    return f"__global__ void {name}({arguments}, CIndexer<2, 1> _ind) {{ {body} }}\n"


def compiled(source, architecture):
    """Return the PTX of ``source``, or fail with NVRTC's log."""
    include = Path(cupy.__file__).parent / "_core" / "include"
    bundled = [include / "cupy" / "_cccl" / part for part in ("cub", "thrust", "libcudacxx")]
    folders = [*bundled, include, CUDA_HEADERS]
    options = [f"-I{folder}" for folder in folders]
    options += ["--std=c++17", f"-arch=compute_{architecture}", "-default-device", "-ftz=true"]
    program = nvrtc.createProgram(source, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, *OPTIONS))
    except Exception:
        pytest.fail(nvrtc.getProgramLog(program))
    return nvrtc.getPTX(program).decode()


def source_of(kernels, *, weighted=False):
    """Return a program with the kernels of each dtype, in namespaces of dtype and name.

    Kernels for strided arrays are there, too, where there are any. All of them have weights, of the
    dtype, or none has.
    """
    common = preamble(weighted=weighted)
    headers = ["complex.cuh", "carray.cuh", "atomics.cuh", "math_constants.h", "float16.cuh"]
    headers += ["bfloat16.cuh"] if "bfloat16" in kernels else []
    source = "".join(f"#include <cupy/{header}>\n" for header in headers) + common
    for dtype, named in kernels.items():
        source += f"namespace of_{dtype} {{\ntypedef {dtype} T;\ntypedef {COMPUTE[dtype]} C;\n"
        source += "typedef T W;\n"
        for name, kernel in named.items():
            assert kernel.preamble.startswith(common)
            own = kernel.preamble.removeprefix(common)
            functions = "".join(framed(kernel, strided) for strided in layouts_of(name))
            source += f"namespace {name} {{ {own} {functions} }}\n"
        source += "}\n"
    return source


def layouts_of(name):
    """Return whether arrays are strided, once for each way in which a kernel is compiled."""
    plain = "_batch_" in name or "vectors" in name  # these take contiguous arrays alone
    return [False] if plain else [False, True]
