"""The cost profile of one model on one machine, as a JSON file.

``streamfill profile`` writes it, prefill servers load it at their start: the one that
``[prefill] cost_profile`` names, else the newest that fits model and device, else the built-in one
(``preemption.costs.BUILT_IN``).
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Final

import msgspec

from streamfill.errors import ConfigError
from streamfill.observability.logging import log_event
from streamfill.preemption.costs import BUILT_IN, CopyCost, CostModel, RecomputeCost
from streamfill.profiling.fits import Curve

logger = logging.getLogger(__name__)

FORMAT: Final = 1
CURVES: Final = ("recompute", "swap_out", "swap_in", "handoff")
_COPY_TIMES: Final = ("fixed_s", "per_byte_s")
_TIMES: Final = {
    "recompute": ("fixed_s", "per_token_s", "per_pair_s"),
    "swap_out": _COPY_TIMES,
    "swap_in": _COPY_TIMES,
}
"""The coefficients that a server needs, by curve."""


class CostProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured, and fitted to it."""

    format: int = FORMAT
    model: str
    """Name of its folder."""
    device: str
    """``cpu``, or the name of the GPU."""
    device_type: str
    """``cpu`` or ``cuda``."""
    bytes_per_token: int
    """Of KV."""
    threads: int
    """CPU threads of the server that was measured."""
    versions: dict[str, str]
    """Of what has a say in it: streamfill, sglang, torch."""
    curves: dict[str, Curve]
    """By the names of ``CURVES``."""

    def cost_model(self) -> CostModel:
        """The coefficients alone, as the controller uses them."""
        recompute = self.curves["recompute"].coefficients
        return CostModel(
            recompute=RecomputeCost(
                fixed_s=recompute["fixed_s"],
                per_token_s=recompute["per_token_s"],
                per_pair_s=recompute["per_pair_s"],
            ),
            swap_out=_copy_cost(self.curves["swap_out"]),
            swap_in=_copy_cost(self.curves["swap_in"]),
            copies_overlap=self.device_type == "cuda",
        )

    @property
    def warnings(self) -> dict[str, str]:
        """What is wrong with which curve."""
        found = {name: curve.warning for name, curve in self.curves.items()}
        return {name: text for name, text in found.items() if text is not None}


def profile_path(home: Path, model: str, device_type: str) -> Path:
    """Where the profile of a model is kept under ``STREAMFILL_HOME``."""
    return home / "profiles" / f"{model}.{device_type}.json"


def save_profile(profile: CostProfile, path: Path) -> None:
    """Write it, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            "--output", str(path), f"cannot be written ({error.strerror}); name another file"
        ) from error


def load_profile(path: Path, key: str = "prefill.cost_profile") -> CostProfile:
    """Read one.

    Args:
        key: the setting that named it, for errors.

    Raises:
        ConfigError: it cannot be read, is no profile, or lacks a curve or a time of one.
    """
    remedy = "make one with `streamfill profile`, or leave the setting out"
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=CostProfile)
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be read ({error.strerror}); {remedy}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(key, str(path), f"is no cost profile: {error}; {remedy}") from error
    if profile.format != FORMAT:
        raise ConfigError(
            key, str(path), f"has format {profile.format}, this version reads {FORMAT}; {remedy}"
        )
    problem = _problem_of(profile)
    if problem is not None:
        raise ConfigError(key, str(path), f"{problem}; {remedy}")
    return profile


def costs_for(
    configured: str | None, *, home: Path, model: str, device_type: str
) -> tuple[CostModel, str]:
    """The cost model that a server starts with, and where it is from.

    Args:
        configured: file that the configuration names.
        model: name of its folder.

    Raises:
        ConfigError: the configured file cannot be used.
    """
    if configured is not None:
        return load_profile(Path(configured)).cost_model(), configured
    path = profile_path(home, model, device_type)
    if path.is_file():
        try:
            profile = load_profile(path)
        except ConfigError as error:
            # Nobody asked for it, so it must not keep a server from starting.
            log_event(logger, "cost_profile_unusable", level=logging.WARNING, error=error)
        else:
            return profile.cost_model(), path.name
    return BUILT_IN.get(device_type, BUILT_IN["cuda"]), "built-in"


def _problem_of(profile: CostProfile) -> str | None:
    """Why no cost model can be made of it; None where one can."""
    missing = _TIMES.keys() - profile.curves.keys()
    if missing:
        return f"lacks {', '.join(sorted(missing))}"
    for name, times in _TIMES.items():
        coefficients = profile.curves[name].coefficients
        for time in times:
            place = f"curves.{name}.coefficients.{time}"
            if time not in coefficients:
                return f"lacks {place}"
            if not 0.0 <= coefficients[time] < math.inf:
                return f"has {place} = {coefficients[time]}, which is no time"
    return None


def _copy_cost(curve: Curve) -> CopyCost:
    coefficients = curve.coefficients
    return CopyCost(fixed_s=coefficients["fixed_s"], per_byte_s=coefficients["per_byte_s"])
