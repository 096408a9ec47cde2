"""The suite on every supported Python, and on the lowest versions of the dependencies.

``nox`` runs all, ``nox -s tests-3.13`` one; each in an environment of its own.
``lowest`` leaves its coverage for ``coverage combine``.
"""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite with the newest versions that this Python can have."""
    session.install(".[test]")
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session(python=["3.10", "3.11"])
def lowest(session: nox.Session) -> None:
    """Run the suite with the lowest versions that pyproject.toml allows."""
    dependencies = nox.project.load_toml("pyproject.toml")["project"]["dependencies"]
    session.install(".[test]", *(each.replace(">=", "==") for each in dependencies))
    processes = "tests/test_processes.py"  # of signals and threads, which a tracer would disturb
    ignored = "--ignore", processes
    session.run("coverage", "run", "-m", "pytest", "-q", *ignored, *session.posargs)
    session.run("python", "-m", "pytest", "-q", processes)
