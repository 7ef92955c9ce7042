"""What streams of a key have in common with those of others: a cache, and shares of the cluster.

Servers get no names of tenants. What they get instead is a digest of the name with a salt, that of
the first key that the file has for the tenant: it stays as it is through restarts of the router, so
that its KV is found again, and nobody makes it of a name that he can guess.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from streamfill.access.keys import KeyEntry
from streamfill.config import CacheNamespaces, RouterConfig
from streamfill.messages.common import NO_SHARE, SHARED_NAMESPACE, Share

_ID_BYTES: Final = 12
_PERSON: Final = b"streamfill.ten.1"


@dataclass(frozen=True, kw_only=True)
class SharingRules:
    """What the cluster file says about tenants."""

    isolates_caches: bool = True
    """A tenant's prompts are served from KV of its own prompts only."""
    is_fair: bool = True
    """Tenants that want more than there is get shares by weight."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of the streams of one key; see ``interface.OpenOptions``."""

    namespace: str = SHARED_NAMESPACE
    share: Share = NO_SHARE


def sharing_rules(config: RouterConfig) -> SharingRules:
    """As configured."""
    return SharingRules(
        isolates_caches=CacheNamespaces(config.cache_namespaces) is CacheNamespaces.TENANT,
        is_fair=config.fair_sharing,
    )


def standings(entries: Iterable[KeyEntry], rules: SharingRules) -> dict[str, Standing]:
    """By id of each key, in the order of the file."""
    tenants: dict[str, str] = {}
    made: dict[str, Standing] = {}
    for entry in entries:
        tenant = tenants.setdefault(entry.tenant, _tenant_id(entry))
        is_isolated = rules.isolates_caches and not entry.shared_cache
        made[entry.id] = Standing(
            namespace=tenant if is_isolated else SHARED_NAMESPACE,
            share=Share(tenant=tenant, weight=entry.weight) if rules.is_fair else NO_SHARE,
        )
    return made


def _tenant_id(first: KeyEntry) -> str:
    """Of the tenant of this key."""
    salt = bytes.fromhex(first.salt)
    name = first.tenant.encode()
    return hashlib.blake2b(name, digest_size=_ID_BYTES, salt=salt, person=_PERSON).hexdigest()
