"""vLLM behind `vllm_stream_server`, as a target with streams.

One connection to its Unix socket for each request; closing it cancels the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from streamfill.errors import (
    DeadlineExceededError,
    ErrorCode,
    InvalidArgumentError,
    StreamError,
    UnavailableError,
)
from streamfill.loadgen.peers.prompt_ids import PieceTokens, PromptTokens
from streamfill.loadgen.target import Ask, Reply, ServerAccount, TargetFacts, TargetStream
from streamfill.loadgen.targets.sse import SILENCE_TIMEOUT_S
from streamfill.messages.common import StreamMode
from streamfill.models.describe import describe_model
from streamfill.traces.script import Content

_LINE_LIMIT_BYTES: Final = 1 << 24


class VllmTarget:
    """One vLLM engine, any number of requests at the same time."""

    has_streams = True

    def __init__(self, socket: Path, *, model_path: Path, name: str = "vllm") -> None:
        """
        Args:
            socket: the driver's.
            model_path: folder of the model that it runs.
        """
        self.name = name
        self._socket = socket
        self._model_path = model_path
        self._tokens: PromptTokens | None = None
        self._open: set[_Connection] = set()

    async def facts(self) -> TargetFacts:
        """As ``Target.facts``."""
        async with self._connected() as connection:
            await connection.send({"op": "facts"})
            said = await connection.receive()
        return TargetFacts(
            model=self._model_path.name,
            vocab_size=describe_model(self._model_path).vocab_size,
            context_tokens=int(said["context_tokens"]),
        )

    async def generate(self, prompt: Content, ask: Ask) -> Reply:
        """As ``Target.generate``."""
        tokens = self._prompt_tokens()
        # A text of 100,000 tokens takes a tenth of a second, which other requests must not wait.
        ids = await asyncio.to_thread(tokens.ids, prompt)
        async with self._connected() as connection:
            await connection.send({"op": "generate", "ids": ids, **_fields(ask)})
            return await self.read_answer(connection, ids)

    @asynccontextmanager
    async def open(self, mode: StreamMode, ask: Ask) -> AsyncIterator[TargetStream]:
        """As ``Target.open``; in append mode only."""
        if mode is not StreamMode.APPEND:
            raise InvalidArgumentError(f"{self.name} can only append to a stream")
        tokens = self._prompt_tokens()
        async with self._connected() as connection:
            await connection.send({"op": "stream", **_fields(ask)})
            yield _VllmStream(self, connection, PieceTokens(tokens))

    async def empty_caches(self) -> None:
        """As ``Target.empty_caches``."""
        async with self._connected() as connection:
            await connection.send({"op": "empty_caches"})
            await connection.receive()

    async def counters(self) -> dict[str, int]:
        """Empty: vLLM counts other things than our servers."""
        return {}

    async def close(self) -> None:
        """As ``Target.close``."""
        for connection in list(self._open):
            connection.close()

    async def read_answer(self, connection: _Connection, ids: list[int]) -> Reply:
        """The answer that the driver sends on this connection, to the prompt ``ids``."""
        output_ids: list[int] = []
        times_s: list[float] = []
        while True:
            message = await connection.receive()
            now = time.monotonic()
            if message.get("done"):
                break
            output_ids.extend(message["ids"])
            times_s.extend([now] * len(message["ids"]))
        return Reply(
            text=self._prompt_tokens().text(ids, output_ids),
            token_ids=tuple(output_ids),
            token_times_s=tuple(times_s),
            account=ServerAccount(
                num_prompt_tokens=len(ids), num_cached_tokens=message.get("num_cached_tokens")
            ),
        )

    def _prompt_tokens(self) -> PromptTokens:
        if self._tokens is None:
            self._tokens = PromptTokens.load(self._model_path)
        return self._tokens

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Connection]:
        try:
            reader, writer = await asyncio.open_unix_connection(
                str(self._socket), limit=_LINE_LIMIT_BYTES
            )
        except OSError as error:
            raise UnavailableError(f"vLLM's driver does not answer: {error.strerror}") from error
        connection = _Connection(reader, writer)
        self._open.add(connection)
        try:
            yield connection
        finally:
            self._open.discard(connection)
            await connection.end()


class _VllmStream:
    """One stream."""

    def __init__(self, target: VllmTarget, connection: _Connection, pieces: PieceTokens) -> None:
        self._target = target
        self._connection = connection
        self._pieces = pieces
        self._turn = asyncio.Lock()
        """Calls may overlap; answers come in the order of what was sent. It is fair, so the pieces
        stay in order."""

    async def send(self, piece: Content) -> None:
        """As ``TargetStream.send``."""
        ids = self._pieces.append(piece)
        if ids:
            async with self._turn:
                await self._connection.send({"op": "append", "ids": ids})
                await self._connection.receive()

    async def commit(self, piece: Content | None) -> Reply:
        """As ``TargetStream.commit``."""
        ids = self._pieces.commit(piece)
        async with self._turn:
            await self._connection.send({"op": "commit", "ids": ids})
            return await self._target.read_answer(self._connection, list(self._pieces.given))


class _Connection:
    """Lines of JSON; the border of the socket's errors."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: Mapping[str, Any]) -> None:
        """Raises ``UnavailableError``: the driver is gone."""
        try:
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
            await self._writer.drain()
        except OSError as error:
            raise UnavailableError("vLLM's driver dropped the connection") from error

    async def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            StreamError: it is an error, or none came.
        """
        try:
            line = await asyncio.wait_for(self._reader.readline(), SILENCE_TIMEOUT_S)
            message = json.loads(line) if line else None
        except TimeoutError as error:
            raise DeadlineExceededError("vLLM's driver was silent for too long") from error
        except (OSError, ValueError) as error:
            raise UnavailableError("vLLM's driver dropped the connection") from error
        if not isinstance(message, dict):
            raise UnavailableError("vLLM's driver ended an answer in the middle")
        if "error" in message:
            code = ErrorCode(message.get("code", ErrorCode.UNKNOWN.value))
            raise StreamError.from_code(code, f"vLLM: {message['error']}")
        return message

    def close(self) -> None:
        """Has the driver cancel the request. Idempotent."""
        self._writer.close()

    async def end(self) -> None:
        """Likewise; returns when the socket is closed."""
        self._writer.close()
        with contextlib.suppress(OSError):  # the driver closed it first, in the middle of a line
            await self._writer.wait_closed()


def _fields(ask: Ask) -> dict[str, Any]:
    return {"request_id": ask.request_id, "max_tokens": ask.max_output_tokens}
