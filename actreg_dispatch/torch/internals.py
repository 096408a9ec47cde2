"""What only private names of PyTorch tell, which may change from one version to the next.

The tests of transforms and of subclasses fail where one does.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["forward_modes", "is_wrapped", "plain_class", "transformed"]


def transformed() -> bool:
    """Return whether tensors may carry more than values, by ``torch.func`` or forward-mode AD.

    The public ``Function.apply`` finds out, too, but looks at signatures first, for 15 µs.
    """
    functorch: bool = torch._C._are_functorch_transforms_active()
    return functorch or forward_ad._current_level >= 0


def forward_modes() -> int:
    """Return how many transforms of ``torch.func`` by forward-mode AD are active."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return whether a transform of ``torch.func`` made ``tensor``, which looks like any other."""
    found: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return found


def plain_class(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of PyTorch's own class with the same values, not asking the subclass."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)
