"""Policies by name: ours, and those of other packages.

A package adds one by an entry point of the group ``streamfill.policies``; its name is the policy's,
its object a function ``(PolicyContext) -> Policy``, such as a sub-class of
``turn_policy.TurnPolicy``. An attribute ``OPTIONS`` of it, ``{name: explanation}``, declares the
options that it takes; the first line of its docstring is what ``streamfill policy list`` shows.

A policy and its options are written ``NAME`` or ``NAME(key=value,key=value)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from streamfill.errors import ConfigError
from streamfill.scheduling.policy import Policy, PolicyContext

GROUP: Final = "streamfill.policies"
DEFAULT_POLICY: Final = "adaptive"

PREEMPTION_OPTION: Final = "preemption"
"""The one option that every policy takes: how KV may be taken from streams while it is in force.
Left out, what the server is configured to."""
PREEMPTION_MODES: Final = ("auto", "swap", "recompute", "none")
"""As ``messages.control.PreemptionMode``."""

Factory = Callable[[PolicyContext], Policy]


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """What a policy is called and takes.

    Attributes:
        options: explanation of each option, with its default, by name.
        source: ``streamfill``, or the package that it comes from.
    """

    name: str
    summary: str
    options: Mapping[str, str]
    source: str = "streamfill"


_SHIPPED: Final = (
    PolicyFacts(
        name="adaptive",
        summary="shortest rest first with ageing, batches by cost, context by expected commit",
        options={
            "ageing": "seconds of waiting that outweigh one second of work; 3",
            "priority_s": "seconds of waiting that a priority of one more is worth; 1",
            "interrupts": "on: commits run between two layers of a step of context; off; on",
        },
    ),
    PolicyFacts(
        name="default",
        summary="arrival order, committed or not; the newest gives up memory (vLLM's own order)",
        options={},
    ),
    PolicyFacts(name="fcfs", summary="committed before uncommitted, each by arrival", options={}),
    PolicyFacts(
        name="lcas",
        summary="committed before uncommitted, each by the arrival of its last chunk",
        options={"order": "oldest (as the published code) or newest (as its docstring); oldest"},
    ),
    PolicyFacts(name="mcps", summary="most computed tokens first, committed or not", options={}),
    PolicyFacts(
        name="laps",
        summary="short and long prefills in separate queues and steps, with a waiting window",
        options={
            "short_tokens": "most tokens of a short prefill; 96",
            "window_ms": "how long short prefills gather while long ones run; 50",
            "long_wait_ms": "a long prefill that waited for so long goes first; 5000",
        },
    ),
    PolicyFacts(
        name="edf",
        summary="least slack to the TTFT SLO first",
        options={"slo_ms": "SLO of streams that name none; 1000"},
    ),
)


def policy_names() -> tuple[str, ...]:
    """All that can be had, ours first."""
    shipped = tuple(facts.name for facts in _SHIPPED)
    return (*shipped, *sorted(set(_plug_ins()) - set(shipped)))


def describe_policies() -> list[PolicyFacts]:
    """All that can be had, ours first. Plug-ins that cannot be loaded are described by their
    error."""
    described = list(_SHIPPED)
    shipped = {facts.name for facts in _SHIPPED}
    for name, entry in sorted(_plug_ins().items()):
        if name in shipped:
            continue
        source = entry.dist.name if entry.dist is not None else entry.value
        try:
            factory = _load(entry)
        except ConfigError as error:
            described.append(
                PolicyFacts(name=name, summary=f"BROKEN: {error}", options={}, source=source)
            )
            continue
        summary = (factory.__doc__ or "").strip().partition("\n")[0]
        described.append(
            PolicyFacts(name=name, summary=summary, options=_options_of(factory), source=source)
        )
    return described


def parse_policy_spec(text: str) -> tuple[str, dict[str, str]]:
    """Name and options of ``lcas(order=newest)``. Says nothing about whether they exist.

    Raises:
        ConfigError: it is not of that form.
    """
    name, bracket, rest = text.strip().partition("(")
    options: dict[str, str] = {}
    if bracket:
        if not rest.endswith(")"):
            raise ConfigError("policy", text, "must be NAME or NAME(key=value,...)")
        for word in filter(None, (word.strip() for word in rest[:-1].split(","))):
            key, equals, value = word.partition("=")
            if not equals or not key.strip():
                raise ConfigError("policy", text, f"{word!r} must be key=value")
            options[key.strip()] = value.strip()
    if not name.strip():
        raise ConfigError("policy", text, "must begin with a name")
    return name.strip(), options


def format_policy_spec(name: str, options: Mapping[str, str]) -> str:
    """The canonical form: options in the order of their names."""
    words = ",".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{name}({words})" if words else name


def check_policy_spec(text: str) -> str:
    """The canonical form of a policy that can be had with these options.

    Raises:
        ConfigError: names the bad value, and what there is.
    """
    name, options = parse_policy_spec(text)
    make_policy(name, options)
    return format_policy_spec(name, options)


def split_preemption(options: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """The option that every policy takes, ``preemption``, and the others.

    Raises:
        ConfigError: there is no such mode.
    """
    rest = dict(options)
    mode = rest.pop(PREEMPTION_OPTION, None)
    if mode is not None and mode not in PREEMPTION_MODES:
        remedy = f"must be one of {', '.join(PREEMPTION_MODES)}"
        raise ConfigError(PREEMPTION_OPTION, mode, remedy)
    return mode, rest


def make_policy(
    name: str,
    options: Mapping[str, str] | None = None,
    *,
    segment_tokens: int | None = None,
    can_interrupt: bool = False,
) -> Policy:
    """A policy, ready to decide.

    Args:
        segment_tokens: see ``PolicyContext``.
        can_interrupt: likewise.

    Raises:
        ConfigError: there is no such policy or option, a value is wrong, or a plug-in is broken.
    """
    _, options = split_preemption(options or {})
    factory, known = _find(name)
    for option in options:
        if option not in known:
            remedy = f"known options: {', '.join((*known, PREEMPTION_OPTION))}"
            raise ConfigError(f"policy {name}", option, f"is no option of it; {remedy}")
    context = PolicyContext(
        segment_tokens=segment_tokens, can_interrupt=can_interrupt, options=options
    )
    try:
        policy = factory(context)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError("policy", name, f"its plug-in cannot be made: {error}") from error
    if not callable(getattr(policy, "decide", None)):
        kind = type(policy).__name__
        raise ConfigError("policy", name, f"its plug-in makes a {kind}, which has no decide()")
    return policy


def _find(name: str) -> tuple[Factory, Mapping[str, str]]:
    for facts in _SHIPPED:
        if facts.name == name:
            return _shipped_factory(name), facts.options
    entry = _plug_ins().get(name)
    if entry is None:
        known = ", ".join(policy_names())
        raise ConfigError("policy", name, f"there is no such policy; known: {known}")
    factory = _load(entry)
    return factory, _options_of(factory)


def _shipped_factory(name: str) -> Factory:
    # Late, so that `--help` and the router need not load them.
    from streamfill.scheduling import adaptive, edf, laps, published

    return {
        "adaptive": adaptive.AdaptivePolicy,
        "default": published.DefaultPolicy,
        "fcfs": published.FcfsPolicy,
        "lcas": published.LcasPolicy,
        "mcps": published.McpsPolicy,
        "laps": laps.LapsPolicy,
        "edf": edf.EdfPolicy,
    }[name]


def _plug_ins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _load(entry: EntryPoint) -> Factory:
    try:
        factory = entry.load()
    except Exception as error:
        raise ConfigError("policy", entry.name, f"its plug-in cannot be loaded: {error}") from error
    if not callable(factory):
        raise ConfigError("policy", entry.name, f"its plug-in {entry.value} is not callable")
    return factory  # type: ignore[no-any-return]  # checked as far as it can be


def _options_of(factory: Factory) -> Mapping[str, str]:
    options: Mapping[str, str] = getattr(factory, "OPTIONS", {})
    return options
