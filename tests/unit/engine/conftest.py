"""Engine tests import SGLang; torchvision has to be importable before any of them is collected."""

from __future__ import annotations

from streamfill.engine.torchvision_fix import install

install()
