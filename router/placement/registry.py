"""Placement policies by name: ours, and those of other packages.

A package adds one by an entry point of the group ``streamfill.placement_policies``; its name is the
policy's, its object a function ``(PlacementContext) -> PlacementPolicy``, such as a sub-class of
``PlacementPolicy``. An attribute ``OPTIONS`` of it, ``{name: explanation}``, declares the options
that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from router.placement.cache_aware import CacheAwarePolicy
from router.placement.dualmap import DualMapPolicy
from router.placement.interface import PlacementContext, PlacementPolicy
from router.placement.simple import (
    LeastLoadedPolicy,
    PowerOfTwoPolicy,
    PullPolicy,
    RoundRobinPolicy,
)
from streamfill.errors import ConfigError

GROUP: Final = "streamfill.placement_policies"

Factory = Callable[[PlacementContext], PlacementPolicy]

_SHIPPED: Final[Mapping[str, Factory]] = {
    "least-loaded": LeastLoadedPolicy,
    "round-robin": RoundRobinPolicy,
    "power-of-two": PowerOfTwoPolicy,
    "cache-aware": CacheAwarePolicy,
    "dualmap": DualMapPolicy,
    "pull": PullPolicy,
}


def placement_names() -> tuple[str, ...]:
    """All that can be had, ours first."""
    return (*_SHIPPED, *sorted(set(_plug_ins()) - set(_SHIPPED)))


def make_placement(name: str, options: Mapping[str, str]) -> PlacementPolicy:
    """A policy, ready to choose.

    Raises:
        ConfigError: there is no such policy or option, a value is wrong, or a plug-in is broken.
    """
    factory = _find(name)
    known: Mapping[str, str] = getattr(factory, "OPTIONS", {})
    for option in options:
        if option not in known:
            remedy = f"known options: {', '.join(known)}" if known else "it has none"
            raise ConfigError(
                f"placement_options.{option}", options[option], f"is no option of {name}; {remedy}"
            )
    try:
        policy = factory(PlacementContext(options=dict(options)))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError("placement", name, f"its plug-in cannot be made: {error}") from error
    if not isinstance(policy, PlacementPolicy):
        raise ConfigError(
            "placement", name, f"its plug-in makes a {type(policy).__name__}, no PlacementPolicy"
        )
    return policy


def format_placement(name: str, options: Mapping[str, str]) -> str:
    """The policy with its options, as people are shown it: ``dualmap(slack_tokens=512)``."""
    words = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{name}({words})" if words else name


def _find(name: str) -> Factory:
    shipped = _SHIPPED.get(name)
    if shipped is not None:
        return shipped
    entry = _plug_ins().get(name)
    if entry is None:
        known = ", ".join(placement_names())
        raise ConfigError("placement", name, f"there is no such policy; known: {known}")
    try:
        factory = entry.load()
    except Exception as error:
        remedy = f"its plug-in cannot be loaded: {error}"
        raise ConfigError("placement", name, remedy) from error
    if not callable(factory):
        raise ConfigError("placement", name, f"its plug-in {entry.value} is not callable")
    return factory  # type: ignore[no-any-return]  # checked as far as it can be


def _plug_ins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
