"""What tests share: the compiled module where it is required, the same random numbers, one checkpoint on disk."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import longattn


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Threads of workers that outnumber the cores wait for each other: four times the time on two cores.
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
        torch.set_num_threads(1)
    info, required = longattn.build_info(), os.environ.get("LONGATTN_REQUIRE_C", "0")
    if required not in ("0", "1", "cuda"):
        raise pytest.UsageError(f"LONGATTN_REQUIRE_C must be 0, 1 or cuda, got {required!r}")
    if required != "0" and not info["compiled"]:
        raise pytest.UsageError(
            f"LONGATTN_REQUIRE_C={required}, but nothing compiled is loaded: {info['error'] or info['reason']}"
        )
    if required == "cuda" and info["no_cuda"]:
        raise pytest.UsageError(f"LONGATTN_REQUIRE_C=cuda, but no CUDA kernels are loaded: {info['no_cuda']}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` need a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint in several shards, made once; tests that damage it take a copy."""
    from checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("llama") / "src")


@pytest.fixture
def src_is_untouched(src: Path) -> Iterator[None]:
    from checkpoints import digests

    before = digests(src)
    yield
    assert digests(src) == before


@pytest.fixture(scope="session")
def gloo() -> Iterator[Any]:
    """Four ranks that all tests of a session share; see `Ranks.run`."""
    from distributed_ranks import Ranks

    ranks = Ranks()
    yield ranks
    ranks.stop()
