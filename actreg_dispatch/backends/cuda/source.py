"""What the sources of all kernels have in common: constants, device functions, names, options."""

from __future__ import annotations

import re
from pathlib import Path

from actreg_dispatch.norms import Norm
from actreg_dispatch.sums.exact import (
    COUNTERS,
    UNIT,
    UNWEIGHTED_UNIT,
    UNWEIGHTED_WORDS,
    WORD_BITS,
    WORDS,
)

__all__ = [
    "OPTIONS",
    "THREADS",
    "columns_of",
    "counters_of",
    "kernel_name",
    "preamble",
    "repeated",
]

THREADS = 256  # of a block

_CONSTANTS = {
    "THREADS": THREADS,
    "PARTS": 6,  # numbers of an expansion: holds numbers 80 decades apart, or squares of 30
    "WORD_BITS": WORD_BITS,
}
_WORDS = {  # of a superaccumulator, by whether there are weights
    False: {"UNIT": UNWEIGHTED_UNIT, "WORDS": UNWEIGHTED_WORDS},
    True: {"UNIT": UNIT, "WORDS": WORDS},
}
_FUNCTIONS = "".join(
    Path(__file__).with_name(f"{part}.cuh").read_text(encoding="utf-8")
    for part in ("arithmetic", "exact_sum", "certified_sum")
)
OPTIONS = ("--fmad=false",)


def columns_of(norm: Norm) -> tuple[str, ...]:
    """Return the columns of the table that has a row for each layer; λ are bits of binary64."""
    lams = [f"{name}{k}" for name in ("LAM", "GRADIENT_LAM") for k in range(norm.n_lams)]
    return ("ACTIVATIONS", "GRADIENTS", "SIZE", "FIRST_BLOCK", "BLOCKS", *lams)


def kernel_name(name: str) -> str:
    """Return the name of a kernel, which a profiler shows."""
    return "actreg_" + re.sub(r"\W", "_", name, flags=re.ASCII)  # as CuPy takes it


def counters_of(*, weighted: bool) -> int:
    """Return how many words there are for each sum, all counters included."""
    return _WORDS[weighted]["WORDS"] + COUNTERS - WORDS


def preamble(batch: Norm | None = None, *, weighted: bool = False) -> str:
    """Return what comes before a kernel, and the columns of the table if it is for a batch."""
    constants = _CONSTANTS | _WORDS[weighted]
    text = "".join(f"constexpr int {key} = {value};\n" for key, value in constants.items())
    columns = f"enum columns {{ {', '.join(columns_of(batch))}, COLUMNS }};\n" if batch else ""
    return text + _FUNCTIONS + columns


def repeated(template: str, count: int, separator: str = " ") -> str:
    """Return the text for k = 0, 1 and so on."""
    return separator.join(template.format(k=k) for k in range(count))
