"""What holds for all tests: the compiled module where it is required, and the same random numbers each time."""

import os

import pytest
import torch

import longattn


def pytest_configure(config: pytest.Config) -> None:
    info = longattn.build_info()
    if os.environ.get("LONGATTN_REQUIRE_C") == "1" and not info["compiled"]:
        raise pytest.UsageError(
            f"LONGATTN_REQUIRE_C=1, but nothing compiled is loaded: {info['error'] or info['reason']}"
        )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
