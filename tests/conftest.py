"""The same randomness in every test, one thread, and markers for what a machine may lack."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

SHARED = Path(__file__).resolve().parents[1].parent / "shared"

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where tests marked gpu run; cpu tries the tests themselves")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if "big" not in config.getoption("markexpr"):
        for item in items:
            if "big" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs gigabytes of memory: -m big"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """A seed; what a test changes in torch's global state ends with it."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and trained weights that lie beside the repository; the test is skipped where they do not."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}")
    for folder in ("data", "models"):
        sys.path.append(str(SHARED / folder))
    return SHARED
