"""Who may connect to a ZeroMQ socket that listens: those that own an admitted key.

The handshake itself is ZeroMQ's, in threads of its own. One thread here has two duties, and waits
where the socket's own thread need not:

1. It answers ZeroMQ's question whether a client's key is admitted (ZAP, RFC 27). Nothing of a
   client comes to the socket before. Without an answer nobody is let in.
2. It hears of handshakes that failed, counts them, and logs them at a bounded rate. Neither keys
   nor what a stranger sent are in the log.
"""

from __future__ import annotations

import enum
import itertools
import logging
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils import z85

from streamfill.curve.keys import ListenKeys
from streamfill.kv_transfer.waker import Waker
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

HANDSHAKE_MS: Final = 10_000
"""Who has not proved itself by then is cut off."""
CLOSE_TIMEOUT_S: Final = 2.0
ZAP_DOMAIN: Final = b"streamfill"
_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_ZAP_VERSION: Final = b"1.0"
_ZAP_FRAMES: Final = 7
_FAILURES: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_WRONG_CRYPTO: Final = 0x11000001
"""ZMQ_PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC of zmq.h; pyzmq has no name for it."""
_EVENT: Final = struct.Struct("=HI")
_numbers = itertools.count(1)


class HandshakeFailure(enum.Enum):
    """Why a connection was not let in."""

    UNKNOWN_KEY = "unknown_key"
    """It owns a key, and not one that is admitted."""
    WRONG_SERVER_KEY = "wrong_server_key"
    """It looks for somebody with another key than ours, or what it sent was changed on the way."""
    NOT_CURVE = "not_curve"
    """It does not speak CURVE."""
    BROKEN_OFF = "broken_off"
    """It went away in the middle, as a peer without keys does; or it took too long."""


class CurveGate:
    """In front of one socket. Made before the socket is bound; closed behind it, and before its
    context is."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        keys: ListenKeys,
        on_refused: Callable[[HandshakeFailure], None],
    ) -> None:
        """
        Args:
            context: of the socket, which may have one gate.
            socket: that will be bound.
            keys: of this side, and who is admitted.
            on_refused: called in the gate's thread for each handshake that failed.
        """
        self._admitted = keys.admitted
        self._on_refused = on_refused
        self._log_refused = RateLimited()
        self._stop = Waker()
        self._zap = context.socket(zmq.REP)
        self._zap.linger = 0
        self._zap.bind(_ZAP_ENDPOINT)
        socket.curve_server = True
        socket.curve_secretkey = keys.secret.reveal()
        socket.zap_domain = ZAP_DOMAIN
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        endpoint = f"inproc://streamfill-handshakes-{next(_numbers)}"
        socket.monitor(endpoint, _FAILURES)
        self._failures = context.socket(zmq.PAIR)
        self._failures.linger = 0
        self._failures.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="curve-gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._stop.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log_event(logger, "curve_gate_close_timeout", level=logging.WARNING)
            return
        self._stop.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        for source in (self._stop.fileno(), self._zap, self._failures):
            poller.register(source, zmq.POLLIN)
        try:
            while True:
                ready = {source for source, _ in poller.poll()}
                if self._zap in ready:
                    self._answer(self._zap.recv_multipart())
                if self._failures in ready:
                    self._note(self._failures.recv_multipart())
                if self._stop.fileno() in ready:
                    return
        except Exception as error:  # noqa: BLE001  from now on nobody is let in
            log_event(logger, "curve_gate_broken", level=logging.ERROR, exception=error)
        finally:
            self._zap.close()
            self._failures.close()

    def _answer(self, request: list[bytes]) -> None:
        """ZeroMQ in this process asks, so a request of another form is a bug, and a refusal."""
        is_admitted = (
            len(request) == _ZAP_FRAMES
            and request[0] == _ZAP_VERSION
            and request[2] == ZAP_DOMAIN
            and request[5] == b"CURVE"
            and len(request[6]) == 32
            and z85.encode(request[6]) in self._admitted
        )
        request_id = request[1] if len(request) > 1 else b""
        code, text = (b"200", b"OK") if is_admitted else (b"400", b"this key is not admitted")
        self._zap.send_multipart((_ZAP_VERSION, request_id, code, text, b"", b""))

    def _note(self, event: list[bytes]) -> None:
        failure = failure_of(event)
        if failure is None:
            return
        self._on_refused(failure)
        if self._log_refused.allow():
            log_event(
                *(logger, "handshake_refused"),
                level=logging.WARNING,
                reason=failure,
                socket=event[1].decode("ascii", "replace"),
                num_suppressed=self._log_refused.num_suppressed,
            )


def failure_of(event: list[bytes]) -> HandshakeFailure | None:
    """What an event of a socket's monitor says; None: nothing of a handshake that failed."""
    kind, value = _EVENT.unpack(event[0])
    match kind:
        case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return HandshakeFailure.UNKNOWN_KEY
        case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            is_crypto = value == _WRONG_CRYPTO
            return HandshakeFailure.WRONG_SERVER_KEY if is_crypto else HandshakeFailure.NOT_CURVE
        case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            return HandshakeFailure.BROKEN_OFF
        case _:
            return None


def gate_of(
    context: zmq.Context[Any],
    socket: zmq.Socket[Any],
    keys: ListenKeys | None,
    on_refused: Callable[[HandshakeFailure], None],
) -> CurveGate | None:
    """A gate where there are keys; None: everybody may connect, and reads in the clear."""
    return None if keys is None else CurveGate(context, socket, keys, on_refused)
