"""Running the gateway: start or join the cluster, serve until interrupted, then drain."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from ..primitives.client import ServiceClient
from ..primitives.errors import InvalidInput, Unavailable
from .access import Access
from .app import create_app
from .core import Gateway
from .settings import Settings
from .store import Store

DRAIN_S = 300.0
STOPPING_S = 10  # for answers on their way when everything else is done


def check_host(host: str, access: Access) -> None:
    """
    Raises:
        InvalidInput: open to other machines without keys.
    """
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not access.closed:
        raise InvalidInput(
            f"--host {host} lets other machines in: give an --api-key-file "
            "(`tinsmith keys add` makes one), or serve on 127.0.0.1"
        )


class _Server(uvicorn.Server):
    """uvicorn, stopping only after the gateway has drained."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway, say: Callable[[str], None]):
        super().__init__(config)
        self._gateway, self._say = gateway, say
        self._stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: object) -> None:
        if self._stopping or not self.started:
            self.force_exit = self.should_exit = True
            return
        self._stopping = True
        # Signals come at any moment: the loop takes it from here.
        self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        waiting = len(self._gateway.futures)
        if waiting:
            self._say(f"finishing {waiting} requests under way; interrupt again to drop them")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gateway.drain(), DRAIN_S)
        self.should_exit = True


async def serve(
    service: ServiceClient,
    settings: Settings,
    access: Access,
    host: str,
    port: int,
    say: Callable[[str], None] = print,
) -> None:
    """Serve HTTP until SIGINT or SIGTERM.

    Raises:
        InvalidInput: `host` is open to other machines without keys.
        Unavailable: the port is taken.
    """
    check_host(host, access)
    store = Store(f"{service.home}/registry.sqlite")
    gateway = Gateway(service, settings, access, store)
    config = uvicorn.Config(
        create_app(gateway),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=STOPPING_S,
    )
    server = _Server(config, gateway, say)
    url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    say(f"serving {url}: set TINKER_BASE_URL={url}, or base_url={url}/v1 for OpenAI clients")
    say(f"metrics for Prometheus are at {url}/metrics; `tinsmith top --url {url}` shows them live")
    if not access.closed:
        say(
            "there are no API keys: only this machine can connect (any TINKER_API_KEY=tml-… will do)"
        )
    try:
        await server.serve()
    except SystemExit:
        raise Unavailable(f"cannot listen on {host}:{port}: is the port taken?") from None
    finally:
        store.close()
