"""`streamfill profile`: measure what it costs to get KV back, for the model and machine at hand.

1. The swap engine and the KV transport are measured, while nothing else runs.
2. A prefill server is started, and streams of many sizes are computed by it, one at a time.
3. Curves are fitted; poor ones are warned of. A JSON file, which servers load at their next start,
   and a page with the curves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamfill.api import Client
from streamfill.cli.bench_target import shown_target
from streamfill.cli.bench_target_options import own_cluster
from streamfill.cli.cluster_options import add_cluster_options, with_changes
from streamfill.errors import ConfigError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.launcher.cluster import StoppedError, unless_stopped
from streamfill.launcher.signals import stop_on_signal
from streamfill.loadgen.cluster_target import OwnCluster
from streamfill.loadgen.environment import environment
from streamfill.loadgen.targets.streamfill import StreamfillTarget
from streamfill.models.describe import describe_model
from streamfill.models.home import streamfill_home
from streamfill.models.progress import show_progress
from streamfill.profiling.fits import fit_copy, fit_recompute
from streamfill.profiling.profile_file import CostProfile, profile_path, save_profile

_EXIT_STOPPED: Final = 130


@dataclass(frozen=True)
class _Sizes:
    """What is measured, in tokens: from what a step of the device hardly notices to its largest."""

    prefixes: tuple[int, ...]
    new: tuple[int, ...]
    swap: tuple[int, ...]
    handoff: tuple[int, ...]


_SIZES: Final = {
    "cpu": _Sizes(
        prefixes=(0, 512, 1536, 3072),
        new=(16, 64, 160, 256, 512),
        swap=(64, 256, 512, 1024, 2048),
        handoff=(256, 512, 1024, 2048),
    ),
    "cuda": _Sizes(
        prefixes=(0, 2048, 8192, 24_576),
        new=(16, 256, 1024, 4096, 8192),
        swap=(256, 1024, 4096, 8192),
        handoff=(1024, 4096, 16_384),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.epilog = (
        "Servers load the profile of their model at their next start: it decides whether KV that "
        "memory pressure takes from a stream is copied to host memory or computed again. Takes a "
        "few minutes on a quiet machine. docs/preemption.md explains the model."
    )
    add_cluster_options(parser)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: where servers look for it, STREAMFILL_HOME/profiles/MODEL.DEVICE.json",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="draw the curves (HTML)")


def run(args: argparse.Namespace) -> int:
    """Measures, fits, writes."""
    if args.repeats < 1:
        raise ConfigError("--repeats", args.repeats, "must be at least 1")
    if args.page is not None and not args.page.parent.is_dir():
        raise ConfigError("--page", str(args.page), "name a file in a folder that exists")
    own = own_cluster(args)
    config = with_changes(own.config, {"decode.count": 0, "prefill.count": 1})
    own = OwnCluster(config=config, model_path=own.model_path)
    return asyncio.run(_profile(own, args))


async def _profile(own: OwnCluster, args: argparse.Namespace) -> int:
    import torch

    from streamfill.profiling.copies import measure_handoff, measure_swap
    from streamfill.profiling.recompute import measure_recompute

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if device_type == "cuda" else "cpu"
    page_size = own.config.prefill.page_size or 1  # as platforms have it
    layout = _layout(own.model_path, page_size, device_type)
    torch.set_num_threads(1)
    print("Measuring copies to and from host memory …", flush=True)
    sizes = _SIZES[device_type]
    out, back = measure_swap(layout, device_type, sizes.swap, args.repeats)
    torch.cuda.empty_cache()  # the server is to have it
    print("Measuring the hand-off …", flush=True)
    handoff = measure_handoff(device_type, sizes.handoff, args.repeats)
    with stop_on_signal() as stop:
        try:
            async with shown_target(own, stop) as opened:
                target = opened.target
                assert isinstance(target, StreamfillTarget)
                with show_progress("Measuring forward passes") as progress:
                    async with Client(target.address) as client:
                        measuring = measure_recompute(
                            client,
                            prefixes=sizes.prefixes,
                            sizes=sizes.new,
                            repeats=args.repeats,
                            on_progress=progress,
                        )
                        recompute = await unless_stopped(measuring, stop)
        except StoppedError:
            return _EXIT_STOPPED
    curves = {
        "recompute": fit_recompute(recompute),
        "swap_out": fit_copy(out),
        "swap_in": fit_copy(back),
        "handoff": fit_copy(handoff),
    }
    versions = environment(model=own.model_path.name).versions
    profile = CostProfile(
        model=own.model_path.name,
        device=device,
        device_type=device_type,
        bytes_per_token=layout.bytes_per_token,
        threads=own.config.prefill.threads,
        versions=versions,
        curves=curves,
    )
    path = args.output or profile_path(streamfill_home(), profile.model, device_type)
    save_profile(profile, path)
    _show(profile)
    print(f"Profile: {path}")
    if args.page is not None:
        from streamfill.profiling.page import render_profile

        args.page.write_text(render_profile(profile), encoding="utf-8")
        print(f"Page: {args.page}")
    print(f"RESULT {json.dumps(_facts(profile))}", flush=True)
    return 0


def _layout(model_path: Path, page_size: int, device_type: str) -> KvLayout:
    """How one rank keeps the model's KV: float32 on the CPU, bfloat16 on a GPU."""
    facts = describe_model(model_path)
    is_cpu = device_type == "cpu"
    return KvLayout(
        num_layers=facts.num_layers,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        v_head_dim=facts.head_dim,
        dtype="float32" if is_cpu else "bfloat16",
        item_bytes=4 if is_cpu else 2,
        page_size=page_size,
    )


def _show(profile: CostProfile) -> None:
    for name, curve in profile.curves.items():
        coefficients = ", ".join(f"{key} {value:.3g}" for key, value in curve.coefficients.items())
        print(
            f"{name:10} {coefficients}; R² {curve.r2:.4f}, median error "
            f"{100 * curve.median_error:.1f} %, {len(curve.points)} points"
        )
    for name, text in profile.warnings.items():
        print(f"warning: the fit of {name} is poor: {text}; measure again on a quiet machine")


def _facts(profile: CostProfile) -> dict[str, Any]:
    return {
        "device": profile.device,
        "model": profile.model,
        **{
            name: {
                **curve.coefficients,
                "r2": round(curve.r2, 4),
                "median_error": round(curve.median_error, 4),
                "num_points": len(curve.points),
                "is_poor": curve.warning is not None,
            }
            for name, curve in profile.curves.items()
        },
    }
