"""What can go wrong in starting a cluster besides its configuration."""

from __future__ import annotations

from streamfill.errors import StreamfillError


class LaunchError(StreamfillError):
    """A process of the cluster did not start, or the cluster cannot go on without it.

    Attributes:
        process: name of the process, such as ``prefill-0``.
        log_tail: the last lines that it wrote, oldest first.
    """

    def __init__(self, process: str, reason: str, log_tail: tuple[str, ...] = ()) -> None:
        text = f"{process} {reason}"
        if log_tail:
            text += "; its last lines were:\n" + "\n".join(f"  {line}" for line in log_tail)
        super().__init__(text)
        self.process = process
        self.log_tail = log_tail
