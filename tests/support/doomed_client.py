"""A client process that a test kills: opens streams, says so, and keeps them busy.

``python doomed_client.py ADDRESS NUM_STREAMS SEED`` prints ``open`` once per stream.
"""

from __future__ import annotations

import asyncio
import sys
from random import Random

from streamfill.api import Client


async def keep_busy(client: Client, random: Random, number: int) -> None:
    """One stream after its ``open`` goes through all of a stream's life, slowly."""
    async with client.stream() as stream:
        print("open", flush=True)
        for part in range(random.randint(0, 6)):
            await stream.append(
                f"Part {part} of number {number} from a client that will not see. " * 4
            )
            await asyncio.sleep(random.uniform(0, 0.05))
        async for _ in stream.commit("Why?", max_tokens=2000, temperature=0.0):
            pass


async def main(address: str, num_streams: int, seed: int) -> None:
    """All streams at once."""
    random = Random(seed)
    async with Client(address) as client:
        await client.wait_ready(60.0)  # another fault may just be over
        await asyncio.gather(*(keep_busy(client, random, number) for number in range(num_streams)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
