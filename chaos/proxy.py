"""A TCP proxy that drops connections when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is closed is reset


class Proxy:
    """Between clients on this machine and the port `target`.

    Attributes:
        dropped: connections that were.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.dropped = 0
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}
        self._cut_at_answer: set[asyncio.StreamWriter] = set()
        self._closed_until = 0.0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()

    # ---- faults ----

    def cut(self) -> None:
        """Drop all connections, whatever they are at."""
        for client in list(self._open):
            self._drop(client)

    def cut_answers(self) -> None:
        """Let every connection's next request through, and drop the connection in place of the
        answer: the client does not know whether it was done."""
        self._cut_at_answer.update(self._open)

    def turn_away(self, seconds: float) -> None:
        """Drop all connections, and new ones for a while."""
        self._closed_until = time.monotonic() + seconds
        self.cut()

    def _drop(self, client: asyncio.StreamWriter) -> None:
        server = self._open.pop(client, None)
        if server is None:
            return
        self.dropped += 1
        self._cut_at_answer.discard(client)
        for writer in (client, server):
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _RESET
                )
            writer.transport.abort()

    # ---- the rest of the time ----

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._closed_until:
            client.transport.abort()
            return
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            client.transport.abort()
            return
        self._open[client] = server
        try:
            await asyncio.gather(
                self._pass_on(reader, server, None), self._pass_on(answers, client, client)
            )
        finally:
            self._open.pop(client, None)
            self._cut_at_answer.discard(client)
            for writer in (client, server):
                writer.close()

    async def _pass_on(
        self,
        source: asyncio.StreamReader,
        to: asyncio.StreamWriter,
        answers: asyncio.StreamWriter | None,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if answers in self._cut_at_answer:
                    assert answers is not None
                    self._drop(answers)
                    return
                to.write(data)
                await to.drain()
            if to.can_write_eof():
                to.write_eof()
