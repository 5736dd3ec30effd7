"""Fixtures that all tests share; tiny models are in tests/tiny.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# As the command line does: two workers share the cores. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from atp_kernels import backend

LONGEST = [
    "atp_edge/cli/test_cli.py",
    "test_real_model.py",
    "atp_export/verification/mutations/test_mutations.py",
    "soak/test_kills.py",
    "atp_edge/pipeline/test_launch.py",
    "atp_edge/pipeline/test_stages.py",
    "atp_edge/masking/test_triton_blocks.py",
    "atp_kernels/test_triton.py",
    "soak/test_faults.py",
]
"""Files of a minute and more, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker takes file after file, and what is taken last is short."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models: more only wait for each other, longest where others compute. For
    the real model a worker's share of the cores."""
    real = request.node.get_closest_marker("real") is not None
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers) if real else 1)


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """SmolLM2-135M-Instruct from its package, as a Hugging Face folder."""
    from atp_edge.data.domains import demo_model_folder

    return demo_model_folder()


@pytest.fixture
def joined_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The path of a GPU, here."""
    monkeypatch.setenv("ATP_KERNELS", "joined")
    backend.backend_name.cache_clear()
    yield
    monkeypatch.undo()
    backend.backend_name.cache_clear()
