"""A real gateway over real HTTP, in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from tinsmith.gateway.access import Access
from tinsmith.gateway.app import create_app
from tinsmith.gateway.core import Gateway
from tinsmith.gateway.settings import Settings
from tinsmith.gateway.store import Store


@contextlib.contextmanager
def serving(
    service, settings: Settings | None = None, access: Access | None = None
) -> Iterator[tuple[str, Gateway]]:
    """The URL, and the gateway behind it."""
    store = Store(f"{service.home}/registry.sqlite")
    gateway = Gateway(service, settings or Settings(), access or Access(), store)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(gateway), log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", gateway
    server.should_exit = True
    thread.join(30)
    listener.close()
    store.close()
