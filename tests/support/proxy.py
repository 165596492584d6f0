"""A TCP proxy between two stages, which delays, holds up and cuts what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from types import TracebackType
from typing import Self

READ_BYTES = 1 << 16


class Proxy:
    """Listens on a port of its own and connects to ``target`` for whoever comes; a context manager with a thread.

    ``delay_s``: what every piece waits before it goes on. ``is_cut``: connections are ended and new ones refused.
    ``held``: which directions stand still, of "to target" and "from target"; what comes is kept.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.delay_s = 0.0
        self.is_cut = False
        self.held: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_up = threading.Event()
        self._changed = asyncio.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_up.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        self.is_cut = True
        asyncio.run_coroutine_threadsafe(self._end_all(), self._loop)

    def hold(self, *directions: str) -> None:
        self.held = set(directions)

    def mend(self) -> None:
        """As if nothing had been."""
        self.is_cut, self.held, self.delay_s = False, set(), 0.0
        asyncio.run_coroutine_threadsafe(self._wake(), self._loop)

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _end_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        await self._wake()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._is_up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end_all())
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pass(reader, back, "to target"), self._pass(there, writer, "from target"))
        for each in (writer, back):
            each.transport.abort()
            self._writers.discard(each)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        while data := await reader.read(READ_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            async with self._changed:
                await self._changed.wait_for(lambda: direction not in self.held)
            writer.write(data)
            await writer.drain()
        writer.transport.abort()
