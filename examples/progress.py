"""Follow a task's progress: every state that it sets comes to `on_message`, pushed, the final one last.

The task is `bake` of `demo_tasks.py`; start its worker with `celery -A demo_tasks worker`.
"""

from __future__ import annotations

from demo_tasks import app, bake
from twisted.internet.task import react

from twistedcelery import TwistedCelery


def show(meta):
    """Draw a bar; `meta` is what Celery keeps of a task: its status, its result so far, and more."""
    if meta["status"] == "PROGRESS":
        done, of = meta["result"]["done"], meta["result"]["of"]
        print(f"\r[{'#' * done:.<{of}}] {done}/{of}", end="", flush=True)
    else:
        print(f"\n{meta['status']}")


async def main(reactor):
    tx = TwistedCelery(app)
    answer = await tx.delay(bake, 20).get(timeout=60, on_message=show)
    print("baked:", answer)


if __name__ == "__main__":
    react(main)
