"""A proxy on TCP that does to what comes through what networks and servers do on bad days."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

BAD_STATUS = b"HTTP/1.1 %d Bad\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyProxy:
    """Passes bytes on to a port of this machine; `fault` may be set at any time.

    "" (none), "hang" (accepts, and never answers), "slow" (1 KB/s), "reset" (breaks off in the answer), "corrupt"
    (turns the last byte of each large piece of an answer), "500", "403", … (answers so), "gone" (refuses).
    """

    def __init__(self, target: int) -> None:
        self.target, self.fault, self.port, self.asked = target, "", 0, 0
        self._writers: list[asyncio.StreamWriter] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._ready.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        for writer in self._writers:
            writer.transport.abort()
        self._loop.run_until_complete(asyncio.gather(*tasks, asyncio.sleep(0.05), return_exceptions=True))
        self._loop.close()

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        if self._server is not None:
            self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        self._writers.append(writer)
        with suppress(OSError, asyncio.CancelledError):
            if self.fault == "gone":
                writer.transport.abort()
                return
            if self.fault == "hang":
                await asyncio.sleep(3600)
            if self.fault.isdecimal():
                await reader.read(1 << 16)
                writer.write(BAD_STATUS % int(self.fault))
                await writer.drain()
                writer.close()
                return
            there, out = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.append(out)
            await asyncio.gather(self._pass_on(reader, out), self._answer(there, writer))

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if self.fault == "hang":
                    await asyncio.sleep(3600)
                target.write(data)
                await target.drain()
            target.close()

    async def _answer(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(1024 if self.fault == "slow" else 1 << 16):
                if self.fault == "slow":
                    await asyncio.sleep(1)
                if self.fault in {"hang", "reset", "gone"}:
                    target.transport.abort()
                    return
                if self.fault == "corrupt" and len(data) > 3000:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                target.write(data)
                await target.drain()
            target.close()
