"""A conversation of 10,000 messages beside one of 10: opening it, and a second of following a reply in it.

    python benchmarks/long_conversation.py [--messages 10000]

Promised: opens within 1 s, and following costs at most 1.3 times as much CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glmui.i18n import Words  # noqa: E402
from glmui.ui import present  # noqa: E402
from glmui.ui.desk import Desk  # noqa: E402
from tests.small_world import World  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=10_000)
    messages = parser.parse_args().messages
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        desk = world.desk()
        small, large = filled(world, 10), filled(world, messages)
        follow(desk, small)  # warm up
        costs = {}
        for name, conversation in (("small", small), ("large", large)):
            began = time.monotonic()
            view = desk.view(conversation)
            present.thread(view.messages, None, Words("en"))
            opened = time.monotonic() - began
            costs[name] = follow(desk, conversation)
            print(f"{name:5}: opens in {opened:.3f} s, follows a reply at {costs[name]:.1%} of a core")
        print(f"large / small: {costs['large'] / costs['small']:.2f}")
        world.service.close()


def filled(world: World, messages: int) -> str:
    """A conversation with so many messages in it."""
    conversation = world.conversation()
    for number in range(messages // 2):
        _, reply = world.store.begin_round(conversation, f"question {number}", "echo")
        world.store.finish_reply(reply.id, f"answer {number} " * 20, "done", "stop")
    return conversation


def follow(desk: Desk, conversation: str, tokens: int = 1000, speed: int = 50) -> float:
    """Part of a core that following one reply takes, from its first token to its last."""

    async def watch() -> float:
        began = cpu = 0.0
        async for view in desk.follow("tab", conversation, 60):
            present.thread(view.messages, view.live, Words("en"))
            present.status(view.live, view.place, view.last_reply, Words("en"))
            if view.live and view.live.tokens and not began:
                began, cpu = time.monotonic(), time.process_time()
        return (time.process_time() - cpu) / (time.monotonic() - began)

    desk.service.send(conversation, f"/echo tokens={tokens} speed={speed}")
    return asyncio.run(watch())


if __name__ == "__main__":
    main()
