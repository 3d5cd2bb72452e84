"""What every test starts from: no network through the hub client, a fixed seed, one thread for tiny models, oneDNN if it is there."""

import os

# Before transformers is imported, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is: processes of tests share the cores, and threads that wait for a core that another has make all of them slow.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
import torch

from activation_beacon import matmul

ALL_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    is_real = request.node.get_closest_marker("default_model") is not None
    torch.set_num_threads(ALL_THREADS if is_real else 1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _onednn_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is faster must not depend on what else the machine does."""
    monkeypatch.setattr(matmul, "_gain", lambda is_few, num_threads: 2.0)
