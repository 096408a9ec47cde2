"""Search, guided by the coverage of the checks, for arrays that they judge wrongly.

``python tests/fuzz_hostile.py -max_total_time=600`` after ``python -m pip install atheris``.
"""

import sys

if __name__ == "__main__":  # it is imported where tests are collected
    import atheris

    with atheris.instrument_imports(
        include=["actreg_dispatch.validation", "actreg_dispatch.layout"]
    ):
        from test_hostile import test_any_array_is_computed_or_refused

    atheris.Setup(sys.argv, test_any_array_is_computed_or_refused.hypothesis.fuzz_one_input)
    atheris.Fuzz()
