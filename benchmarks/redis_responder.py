"""An instant responder in place of a worker on Redis: it stores and publishes a result for every task message.

Run as ``python -m benchmarks.redis_responder REDIS_URL QUEUE``; prints "ready" when it reads.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import redis

#: JSON of what Celery's Redis backend stores, around the task's id.
_RESULT = (
    '{"status": "SUCCESS", "result": 3, "traceback": null, "children": [], '
    '"date_done": "2026-01-01T00:00:00+00:00", "group_id": null, "parent_id": null, "task_id": "%s"}'
)

#: Seconds that a result is kept: the default of ``result_expires``.
_EXPIRES = 86400

#: Messages answered with one write.
_BATCH = 100


def respond(url: str, queue: str) -> None:
    """Answer for ever."""
    # redis-py's own limit would end it where nothing comes for 5 s.
    client: Any = redis.Redis.from_url(url, socket_timeout=None)
    client.ping()
    print("ready", flush=True)
    while True:
        _, first = client.brpop([queue])
        messages = [first, *(client.rpop(queue, _BATCH) or ())]
        with client.pipeline(transaction=False) as pipeline:
            for message in messages:
                task_id = json.loads(message)["properties"]["correlation_id"]
                key, value = f"celery-task-meta-{task_id}", _RESULT % task_id
                pipeline.setex(key, _EXPIRES, value)
                pipeline.publish(key, value)
            pipeline.execute()


if __name__ == "__main__":
    respond(*sys.argv[1:])
