from __future__ import annotations

import os

import pytest

import tinsmith
from tests.tiny import make_tiny_model

# The engines' threads in the tests, here and in the actors, so that results can be compared bitwise.
THREADS = 1
# And their library for products, which would be measured once for every home.
os.environ.setdefault("TINSMITH_PRODUCTS", "blas")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen2", "qwen2")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3")


@pytest.fixture(scope="session")
def tiny_moe(tmp_path_factory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny-moe", "qwen3_moe")


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory):
    """A `TINSMITH_HOME` whose models folder holds `tiny-llama` and `tiny-qwen3`."""
    home = tmp_path_factory.mktemp("home")
    for family in ("llama", "qwen3"):
        make_tiny_model(home / "models" / f"tiny-{family}", family)
    return home


@pytest.fixture(scope="session")
async def service(tiny_home):
    """One real cluster for all tests that need one."""
    async with tinsmith.connect(
        home=tiny_home,
        num_cpus=2,
        learner_threads=THREADS,
        sampler_threads=THREADS,
        kv_bytes=1 << 24,
    ) as service:
        yield service
