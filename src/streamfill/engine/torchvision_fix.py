"""Lets torchvision be imported where its compiled operators cannot load.

transformers wants torchvision at import, and a package index may offer only CUDA builds of it. Such
a build cannot load its operators next to a CPU build of torch. Its Python parts, which are all that
is used here, then fail on one thing: they attach shape functions to two operators that are missing.

1. `install` puts a finder in front of `sys.meta_path`. Nothing is imported by that, torch included.
2. torchvision imports its `extension` first, which tries to load the operators.
3. The finder sees the import that follows and asks `extension` whether they loaded. Where they
   did, nothing is changed; where they did not, it declares the two schemas, without kernels.
4. From then on the finder answers None to everything, as it always does: it never loads a module
   itself. It stays in `sys.meta_path`, because that list is being walked while a finder runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_EXTENSION: Final = "torchvision.extension"
_SCHEMAS: Final = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class _OperatorSchemaFinder(MetaPathFinder):
    """Declares torchvision's missing schemas between two of its imports; finds no module."""

    def __init__(self) -> None:
        self._done = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Always answers None, so that the ordinary finders load `fullname`."""
        if self._done or not fullname.startswith("torchvision.") or fullname == _EXTENSION:
            return None
        extension = sys.modules.get(_EXTENSION)
        has_ops = getattr(extension, "_has_ops", None)
        if has_ops is None:  # `extension` itself is still being executed
            return None
        self._done = True
        if not has_ops():
            _declare_schemas()
        return None


def install() -> None:
    """Arms the fix for the first import of torchvision in this process.

    Call it before transformers or sglang is imported. Repeated calls, and calls after torchvision
    was imported, do nothing.
    """
    if "torchvision" in sys.modules:
        return
    if any(isinstance(finder, _OperatorSchemaFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _OperatorSchemaFinder())


def _declare_schemas() -> None:
    """Defines the schemas that torchvision's Python parts refer to, where they are undefined."""
    import torch

    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema.removeprefix(name))
