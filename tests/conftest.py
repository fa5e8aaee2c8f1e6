"""Options and settings of all tests."""

import os
from collections.abc import Iterator
from unittest import mock

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: one thread each, set before NumPy and torch load
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite expected outputs; review the difference")


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session", autouse=True)
def compiles_alone() -> Iterator[None]:
    """Workers are as many as there are cores: each compiles kernels itself, unless a test asks for more processes."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    with mock.patch("tilewright.codegen.workers._JOBS_A_WORKER", 1 << 30):
        yield


@pytest.fixture
def bless(request: pytest.FixtureRequest) -> bool:
    """Whether expected outputs are to be rewritten (``pytest --bless``)."""
    return bool(request.config.getoption("--bless"))
