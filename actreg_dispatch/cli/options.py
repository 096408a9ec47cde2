"""Types and checks of options that more than one command has."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from actreg_dispatch.options import REDUCTIONS, Reduction, check_reduction

__all__ = ["natural", "positive", "reduction", "why_not_writable"]


def positive(text: str) -> int:
    """Return the whole number that ``text`` is, from 1 up."""
    number = natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def natural(text: str) -> int:
    """Return the whole number that ``text`` is, from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 0")
    return int(text)


def reduction(text: str) -> Reduction:
    """Return what λ is divided by: a name, or axes with commas between them."""
    try:
        return check_reduction(text if text in REDUCTIONS else tuple(map(int, text.split(","))))
    except ValueError:
        known = ", ".join(REDUCTIONS)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of: {known}, or axes such as 0,1"
        ) from None


def why_not_writable(option: str, path: Path, suffix: str, overwrite: bool) -> str:
    """Return why no file can be written there, to be told before the work; empty if one can."""
    if path.suffix.lower() != suffix:
        return f"{option} {path} is not a {suffix[1:].upper()}; let the name end in {suffix}"
    if path.is_dir() or (path.exists() and not overwrite):
        return f"{option} {path} exists; name another file, or add --overwrite to replace a file"
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        return f"{option} {path} cannot be written: {path.parent} is not a folder to write to"
    return ""
