"""Comparisons of actreg_dispatch with the limits of the machine and with other libraries.

``python -m benchmarks`` times calls for NumPy or CuPy arrays. ``__main__.py`` has its options,
``comparison.py`` is a run, ``contenders.py`` has what is timed, ``cuda.py`` the same for a GPU,
``timing.py`` times it, and ``report.py`` shows the results. ``python -m benchmarks.routes`` times
the other routes to the kernels: many layers, files, other libraries' arrays; ``python -m
benchmarks.exact_sums`` times exact sums, ``python -m benchmarks.dask_arrays`` Dask. ``python -m
benchmarks.model`` models times on GPUs from what a software device counts.

It is not installed with the package: it runs in a clone, from the clone's root.
"""
