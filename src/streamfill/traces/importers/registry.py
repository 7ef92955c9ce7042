"""All formats that can be imported."""

from __future__ import annotations

from typing import Final

from streamfill.traces.importers import (
    azure,
    burstgpt,
    mooncake,
    openai_messages,
    stream2llm_anns,
    stream2llm_crawler,
)
from streamfill.traces.importers.interface import ImportFormat

FORMATS: Final[tuple[ImportFormat, ...]] = (
    stream2llm_crawler.FORMAT,
    stream2llm_anns.FORMAT,
    mooncake.FORMAT,
    burstgpt.FORMAT,
    azure.FORMAT,
    openai_messages.FORMAT,
)
"""In the order of ``--help``."""
