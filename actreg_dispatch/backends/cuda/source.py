"""What the sources of all kernels have in common: constants, device functions, names, options."""

from __future__ import annotations

import re
from pathlib import Path

from actreg_dispatch.norms import Norm
from actreg_dispatch.sums.exact import UNIT, WORD_BITS, WORDS

__all__ = [
    "OPTIONS",
    "PREAMBLE",
    "THREADS",
    "columns_of",
    "kernel_name",
    "preamble",
    "repeated",
]

THREADS = 256  # of a block

_CONSTANTS = {
    "THREADS": THREADS,
    "PARTS": 6,  # numbers of an expansion: holds numbers 80 decades apart, or squares of 30
    "UNIT": UNIT,
    "WORDS": WORDS,
    "WORD_BITS": WORD_BITS,
}
PREAMBLE = "".join(f"constexpr int {key} = {value};\n" for key, value in _CONSTANTS.items()) + (
    "".join(
        Path(__file__).with_name(f"{part}.cuh").read_text(encoding="utf-8")
        for part in ("arithmetic", "exact_sum", "certified_sum")
    )
)
OPTIONS = ("--fmad=false",)


def columns_of(norm: Norm) -> tuple[str, ...]:
    """Return the columns of the table that has a row for each layer; λ are bits of binary64."""
    lams = [f"{name}{k}" for name in ("LAM", "GRADIENT_LAM") for k in range(norm.n_lams)]
    return ("ACTIVATIONS", "GRADIENTS", "SIZE", "FIRST_BLOCK", "BLOCKS", *lams)


def kernel_name(name: str) -> str:
    """Return the name of a kernel, which a profiler shows."""
    return "actreg_" + re.sub(r"\W", "_", name, flags=re.ASCII)  # as CuPy takes it


def preamble(batch: Norm | None) -> str:
    """Return what comes before a kernel, and the columns of the table if it is for a batch."""
    columns = f"enum columns {{ {', '.join(columns_of(batch))}, COLUMNS }};\n" if batch else ""
    return PREAMBLE + columns


def repeated(template: str, count: int, separator: str = " ") -> str:
    """Return the text for k = 0, 1 and so on."""
    return separator.join(template.format(k=k) for k in range(count))
