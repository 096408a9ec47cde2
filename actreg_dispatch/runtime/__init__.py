"""What the process and the system do to kernels: threads, forks, signals, subnormals, memory.

Nothing is imported here: :mod:`~actreg_dispatch.runtime.subnormals` needs Numba, and the others
are needed before it.
"""
