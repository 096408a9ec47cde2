"""The CUDA kernels compile for every architecture in use, on machines without a GPU too."""

from __future__ import annotations

import re

import pytest
from cuda_frames import COMPUTE, KERNELS, compiled, layouts_of, require_headers, source_of

KINDS = ["", "_certified", "_certified_vectors"]


def test_every_kind_of_kernel_is_found():
    sums = {f"sum{kind}_{terms}" for kind in KINDS for terms in ("1", "2", "1_2")}
    applies = {f"apply{kind}_l1" for kind in KINDS}
    ends = {f"{kind}_foreign" for kind in ("update", "update_vectors", "certify", "finish")}
    for kind in sums | applies | ends:
        assert {f"actreg_{kind}", f"actreg_batch_{kind}"} <= KERNELS.keys()
    assert {"actreg_count", "actreg_count_vectors", "actreg_count_units"} <= KERNELS.keys()
    rows = {f"{what}{kind}_l2" for what in ("sum", "apply") for kind in ("", "_certified")}
    assert {f"actreg_rows_{kind}" for kind in rows | {"certify"}} <= KERNELS.keys()


@pytest.mark.parametrize("architecture", [75, 80, 90, 120])
@pytest.mark.parametrize("dtype", COMPUTE)
def test_every_kernel_compiles(request, dtype, architecture):
    require_headers(request)
    source = source_of({dtype: KERNELS})
    count = sum(len(layouts_of(name)) for name in KERNELS)
    ptx = compiled(source, architecture)
    assert f".target sm_{architecture}" in ptx
    assert ptx.count(".entry") == count
    ours = re.compile("// begin inline asm.*?// end inline asm", re.DOTALL)
    assert "fma.rn.f32" not in ours.sub("", ptx)  # but where it is asked for
    assert ".ftz" not in ptx  # though CuPy asks for it, subnormal numbers stay
