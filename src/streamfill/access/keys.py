"""API keys: how one looks, what is kept of it, and whether a given one is right. Pure.

A key is ``sf-ID-SECRET``. The id finds its entry, so that one hash is computed per call, however
many keys there are. The secret has 256 random bits and is never chosen by a person. Nobody can
guess it from its hash, however fast the hash is; a slow one, as passwords need it, would only let
strangers keep the router busy with wrong keys. What is kept is a salted BLAKE2b (RFC 7693) of the
whole key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Final

import msgspec

NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Of keys and tenants: they stand in log lines and on the command line."""
NAME_RULE: Final = (
    "use up to 64 letters, digits, dots, dashes and underscores, a letter or digit first"
)
MAX_KEY_CHARS: Final = 128
"""Longer is none of ours, and not worth a hash."""
DEFAULT_WEIGHT: Final = 1.0
MIN_WEIGHT: Final = 0.001
MAX_WEIGHT: Final = 1000.0
"""What is further apart is no share any more, but a refusal; that is what limits are for."""

_PREFIX: Final = "sf"
_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_SALT_BYTES: Final = 16  # the most that BLAKE2b takes
_HASH_BYTES: Final = 32
_PERSON: Final = b"streamfill.key.1"


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be done with one key. None: as much as the cluster can."""

    max_streams: int | None = None
    """Open at the same time."""
    requests_per_s: float | None = None
    """Calls, HTTP requests and WebSockets begun."""
    tokens_per_min: int | None = None
    """Of prompts and answers together."""


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a key file says about one key. No secret is in it."""

    id: str
    name: str
    """Of the key, for people; unique in its file."""
    tenant: str
    """Who owns the streams that are opened with it. Several keys may have one tenant."""
    salt: str
    """Hexadecimal, as ``hash``."""
    hash: str
    is_operator: bool = False
    """May change the cluster (scheduling policy, caches) and sees the streams of all tenants."""
    created: str = ""
    """Day and time in UTC, for people."""
    limits: KeyLimits = KeyLimits()
    shared_cache: bool = False
    """Its streams use KV of everybody who says the same, and let them use theirs. Otherwise only
    streams of the same tenant do."""
    weight: float = DEFAULT_WEIGHT
    """Of its streams, where tenants want more tokens than there are: twice the weight, twice the
    tokens."""


def new_key(
    name: str,
    *,
    tenant: str | None = None,
    is_operator: bool = False,
    limits: KeyLimits | None = None,
    created: str = "",
    shared_cache: bool = False,
    weight: float = DEFAULT_WEIGHT,
) -> tuple[str, KeyEntry]:
    """A key that did not exist before, and what is to be kept of it.

    Args:
        name: of the key.
        tenant: None: one of its own, with the key's name.
        is_operator: as in ``KeyEntry``.
        limits: None: none.
        created: as in ``KeyEntry``, as the last two.
    """
    key_id = secrets.token_hex(_ID_BYTES)
    key = f"{_PREFIX}-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    salt = secrets.token_bytes(_SALT_BYTES)
    entry = KeyEntry(
        id=key_id,
        name=name,
        tenant=tenant or name,
        salt=salt.hex(),
        hash=_hash(key, salt).hex(),
        is_operator=is_operator,
        created=created,
        limits=limits or KeyLimits(),
        shared_cache=shared_cache,
        weight=weight,
    )
    return key, entry


def id_of(key: str) -> str | None:
    """The id in a key; None when it is no key at all."""
    parts = key.split("-", 2)
    if len(key) > MAX_KEY_CHARS or len(parts) != 3 or parts[0] != _PREFIX:
        return None
    return parts[1]


def is_key_of(key: str, entry: KeyEntry) -> bool:
    """Whether ``entry`` was made for ``key``. Takes as long whatever the difference is."""
    made = _hash(key, bytes.fromhex(entry.salt))
    return hmac.compare_digest(made, bytes.fromhex(entry.hash))


def problem_of(entry: KeyEntry) -> str | None:
    """What cannot be in ``entry``, as words that do not show the value; None when all is well."""
    for field, num_bytes in (("id", _ID_BYTES), ("salt", _SALT_BYTES), ("hash", _HASH_BYTES)):
        if not re.fullmatch(f"[0-9a-f]{{{2 * num_bytes}}}", getattr(entry, field)):
            return f"{field} must be {2 * num_bytes} hexadecimal digits"
    for field in ("name", "tenant"):
        if not NAME_PATTERN.fullmatch(getattr(entry, field)):
            return f"{field}: {NAME_RULE}"
    for field in ("max_streams", "requests_per_s", "tokens_per_min"):
        value = getattr(entry.limits, field)
        if value is not None and not 0 < value < float("inf"):
            return f"limits.{field} must be above 0, or left out for no limit"
    if not MIN_WEIGHT <= entry.weight <= MAX_WEIGHT:
        return f"weight must be between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}"
    return None


def _hash(key: str, salt: bytes) -> bytes:
    data = key.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=_HASH_BYTES, salt=salt, person=_PERSON).digest()
