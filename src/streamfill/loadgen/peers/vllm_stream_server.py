"""Run by the Python of vLLM's own environment: one vLLM engine behind a Unix socket.

Imports nothing but vLLM and the standard library. One connection carries one request; lines of JSON
go both ways, and closing the connection cancels the request.

From the client::

    {"op": "facts"}                        -> {"context_tokens": n, "version": "…"}
    {"op": "empty_caches"}                 -> {"done": true}, or {"error": "…", "code": "…"}
    {"op": "generate", "request_id": "…", "max_tokens": n, "ids": [...]}
    {"op": "stream", "request_id": "…", "max_tokens": n}
        {"op": "append", "ids": [...]}     -> {"taken": true}, any number of times
        {"op": "commit", "ids": [...]}     ids are not empty

The answer to the last two: ``{"ids": [...]}`` as tokens come, then ``{"done": true,
"num_cached_tokens": n}``; the number is null where vLLM does not say it.

Of a ``StreamingInput`` session vLLM samples at least one token behind each input and drops it when
the next input comes. So each piece is asked for one token, which is not passed on, and the last
piece for as many as the answer is to have. That is vLLM's cost of streaming; nothing is added here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

_LINE_LIMIT_BYTES = 1 << 24
"""A prompt of a million tokens fits a line."""

FLUSH_TIMEOUT_S = 15.0
"""A step of 2,048 tokens takes some seconds on a slow core."""
_FLUSH_POLL_S = 0.1


def main() -> int:
    """Starts the engine, prints ``READY {json}``, serves until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--context-tokens", type=int, required=True)
    parser.add_argument("--kv-bytes", type=int, required=True)
    args = parser.parse_args()
    asyncio.run(_serve(args))
    return 0


async def _serve(args: argparse.Namespace) -> None:
    import vllm  # type: ignore[import-not-found]
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=args.model,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=args.context_tokens,
            kv_cache_memory_bytes=args.kv_bytes,
            enable_prefix_caching=True,
            enable_log_requests=False,
            disable_log_stats=True,
        )
    )
    facts = {"context_tokens": int(engine.model_config.max_model_len), "version": vllm.__version__}
    try:
        server = await asyncio.start_unix_server(
            _Connections(engine, facts).handle, args.socket, limit=_LINE_LIMIT_BYTES, backlog=4096
        )
        print(f"READY {json.dumps(facts)}", flush=True)
        await stop.wait()
        server.close()
    finally:
        engine.shutdown()


class _Connections:
    """Serves the connections of one engine."""

    def __init__(self, engine: Any, facts: dict[str, Any]) -> None:
        self._engine = engine
        self._facts = facts

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        try:
            await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away: that cancels its request
        except Exception as error:  # noqa: BLE001  the edge of one request: its sender is told
            # vLLM has a class of its own for values that it refuses.
            is_validation = "Validation" in type(error).__name__
            is_argument = is_validation or isinstance(error, (ValueError, TypeError, KeyError))
            code = "INVALID_ARGUMENT" if is_argument else "UNAVAILABLE"
            text = f"{type(error).__name__}: {error}"
            with contextlib.suppress(ConnectionError):
                await _send(writer, {"error": text, "code": code})
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if not line:
            return
        message = json.loads(line)
        match message["op"]:
            case "facts":
                await _send(writer, self._facts)
            case "empty_caches":
                await self._empty_caches()
                await _send(writer, {"done": True})
            case "generate":
                await self._run(reader, writer, message, _Prompt(message["ids"]))
            case "stream":
                await self._run(reader, writer, message, None)
            case other:
                raise ValueError(f"unknown operation {other!r}")

    async def _empty_caches(self) -> None:
        # A cancelled request may hold blocks until the step that it was part of is over.
        deadline_s = time.monotonic() + FLUSH_TIMEOUT_S
        while not await self._engine.reset_prefix_cache():
            if time.monotonic() > deadline_s:
                raise RuntimeError("vLLM did not empty its prefix cache: requests are open")
            await asyncio.sleep(_FLUSH_POLL_S)

    async def _run(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        message: dict[str, Any],
        prompt: _Prompt | None,
    ) -> None:
        stream = None if prompt is not None else _Stream(message["max_tokens"])
        source: Any = prompt.as_input() if prompt is not None else stream.inputs()  # type: ignore[union-attr]
        answering = asyncio.create_task(
            self._pass_on(writer, source, message, stream), name=message["request_id"]
        )
        reading = asyncio.create_task(_read(reader, writer, stream))
        try:
            await asyncio.wait({answering, reading}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                await answering
            else:
                await reading  # it ends first only with an error: the connection is gone
        finally:
            for task in (answering, reading):
                task.cancel()
            await asyncio.gather(answering, reading, return_exceptions=True)

    async def _pass_on(
        self,
        writer: asyncio.StreamWriter,
        source: Any,
        message: dict[str, Any],
        stream: _Stream | None,
    ) -> None:
        num_cached: int | None = None
        num_seen = 0
        outputs = self._engine.generate(
            source, _sampling(int(message["max_tokens"])), message["request_id"]
        )
        async for output in outputs:
            if stream is None and output.num_cached_tokens is not None:
                num_cached = output.num_cached_tokens
            ids = list(output.outputs[0].token_ids) if output.outputs else []
            # One token for each piece before the last is not of the answer; several outputs may
            # come as one.
            num_dropped = stream.num_pieces_before_last(num_seen) if stream is not None else 0
            kept = ids[max(0, num_dropped - num_seen) :]
            num_seen += len(ids)
            if kept:
                await _send(writer, {"ids": kept})
        await _send(writer, {"done": True, "num_cached_tokens": num_cached})


class _Prompt:
    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def as_input(self) -> dict[str, list[int]]:
        return {"prompt_token_ids": self._ids}


class _Stream:
    """The pieces of one ``StreamingInput`` session."""

    def __init__(self, max_tokens: int) -> None:
        self._pieces: asyncio.Queue[tuple[list[int], bool]] = asyncio.Queue()
        self._max_tokens = max_tokens
        self._num_before_last: int | None = None
        self._num_put = 0

    def put(self, ids: list[int], *, is_last: bool) -> None:
        """Takes a piece."""
        if self._num_before_last is not None:
            raise ValueError("the stream is committed")
        if not ids:
            raise ValueError("a piece has no tokens")
        if is_last:
            self._num_before_last = self._num_put
        self._num_put += 1
        self._pieces.put_nowait((ids, is_last))

    def num_pieces_before_last(self, num_seen: int) -> int:
        """How many tokens at the front are not of the answer; all seen so far before a commit."""
        # Before the commit every token belongs to a piece that is not the last.
        return self._num_before_last if self._num_before_last is not None else num_seen + (1 << 30)

    async def inputs(self) -> AsyncGenerator[Any, None]:
        """For ``AsyncLLM.generate``."""
        from vllm.engine.protocol import StreamingInput  # type: ignore[import-not-found]

        while True:
            ids, is_last = await self._pieces.get()
            num_tokens = self._max_tokens if is_last else 1
            yield StreamingInput(
                prompt={"prompt_token_ids": ids},
                sampling_params=_sampling(num_tokens),
            )
            if is_last:
                return


async def _read(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: _Stream | None
) -> None:
    """Takes the pieces of a stream; raises when the connection ends."""
    while True:
        line = await reader.readline()
        if not line:
            raise ConnectionResetError
        message = json.loads(line)
        if stream is None or message["op"] not in {"append", "commit"}:
            raise ValueError(f"operation {message['op']!r} in the middle of a request")
        is_last = message["op"] == "commit"
        stream.put(message["ids"], is_last=is_last)
        if not is_last:
            await _send(writer, {"taken": True})


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")
    await writer.drain()


def _sampling(max_tokens: int) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # type: ignore[import-not-found]

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    sys.exit(main())
