from __future__ import annotations

import pytest

from tests.cookbook.kitchen import Kitchen, Log
from tests.gateway.serving import serving
from tinsmith.gateway.settings import Settings

pytest.importorskip("tinker_cookbook")


@pytest.fixture(scope="session")
def kitchen(service, tmp_path_factory):
    """One gateway for all recipes, which serves a tiny model under the names they ask for."""
    from tests.cookbook.workspace import make_workspace

    workspace = tmp_path_factory.mktemp("cookbook")
    served = make_workspace(workspace)
    with serving(service, Settings(models=served)) as (url, _):
        yield Kitchen(workspace, url)


@pytest.fixture(scope="session")
def taught(kitchen, tmp_path_factory) -> Log:
    """A model that can do small sums, and mostly stops when it is done."""
    log = Log(tmp_path_factory.mktemp("taught") / "log")
    kitchen.chat_sl(log.folder)
    kitchen.check(log, 32)
    return log
