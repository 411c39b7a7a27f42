from __future__ import annotations

import pytest
import tinker

from tests.gateway.serving import serving
from tinsmith.gateway.core import Gateway

KEY = "tml-of-the-tests"


@pytest.fixture(scope="session", autouse=True)
def sdk_environment():
    patch = pytest.MonkeyPatch()
    patch.setenv("TINKER_API_KEY", KEY)
    patch.setenv("TINKER_TELEMETRY", "0")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def served(service, sdk_environment):
    """(URL, gateway), one for all tests that need nothing special of it."""
    with serving(service) as (url, gateway):
        yield url, gateway


@pytest.fixture(scope="session")
def url(served) -> str:
    return served[0]


@pytest.fixture(scope="session")
def gateway(served) -> Gateway:
    return served[1]


@pytest.fixture
def client(url):
    """The SDK, in a session of its own."""
    with tinker.ServiceClient(base_url=url) as client:
        yield client


@pytest.fixture
def training(client):
    return client.create_lora_training_client(base_model="tiny-llama", rank=4, seed=1).result()
