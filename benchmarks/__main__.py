"""What a call costs the program that makes it: this library, stock Celery and a thread pool, side by side.

Run as ``python -m benchmarks [--quick] [amqp] [redis]``. Each way runs in a client process of its own, against the same
private server, with an instant responder in place of the worker. Printed are the CPU time of the client process
per call, and how late a 10 ms tick of its reactor came: in all, less what other processes of the machine are to
blame for, less what the garbage collector is. Nothing is asserted: the numbers are for people.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

from benchmarks.measure import Order
from tests.support.processes import Process, ServerFailed, directory, end_all, wait_until
from tests.support.servers import PROJECT, RabbitMQ, Redis

ANSWERED, UNANSWERED = "answered", "unanswered"

#: Calls in flight at once, for each way; the slower ways have fewer, as their cost per call does not depend on it.
CALLS = {"ours": 10_000, "stock": 4_000, "threads": 1_000, "beside": 2_000, "group": 10_000}

#: Results that stay pending, beside which calls are measured.
PENDING = 100_000

#: Bytes of a big argument.
SIZE = 50_000_000

#: Seconds that one client may take.
PATIENCE = 300.0

Numbers = dict[str, Any]


def start(module: str, *arguments: str) -> Process:
    """Start a module of this package in a process of its own."""
    where = directory(module)
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return Process(command, log=where / "output.log", env=os.environ, cwd=PROJECT)


def run(module: str, order: Order) -> tuple[str, Numbers]:
    """Run a client to its end; returns what it printed, and the numbers of its last line."""
    client = start(module, order.to_json())
    wait_until(lambda: client.exit_code is not None, timeout=PATIENCE, what=f"benchmarks.{module} goes on")
    output = client.log.read_text()
    if client.exit_code:
        raise ServerFailed(f"benchmarks.{module} ended with {client.exit_code}\n{output}")
    text, _, last = output.rstrip().rpartition("\n")
    return text, json.loads(last)


def servers(name: str) -> tuple[str, str, str]:
    """Start a server; returns the URLs of broker and backend, and the responder's module."""
    if name == "amqp":
        rabbitmq = RabbitMQ()
        rabbitmq.start()
        return rabbitmq.url, "rpc://", "responder"
    redis = Redis()
    redis.start()
    return redis.url, redis.url, "redis_responder"


def measure(name: str, scale: float, *, profile: bool) -> None:
    """Start a server, measure all ways, print the tables."""
    broker, backend, module = servers(name)
    responder = start(module, broker, ANSWERED)
    wait_until(lambda: "ready" in responder.tail(), timeout=30, what="no responder", process=responder)

    def order(way: str, **more: Any) -> Order:
        calls = max(20, int(CALLS[way] * scale))
        return Order(broker, backend, ANSWERED, UNANSWERED, responder.pids()[0], calls, **more)

    title = "RabbitMQ, results by rpc" if name == "amqp" else "Redis, results by Redis"
    print(f"\n{title}\n{'=' * len(title)}\n", flush=True)
    if profile:
        print(run("ours", order("ours", profile=True))[0], flush=True)
        return
    stock = run("stock", order("stock"))[1]
    threads = run("threads", order("threads"))[1]
    ours = run("ours", order("ours"))[1]
    many = max(200, int(PENDING * scale))
    pending = run("pending", order("beside", pending=many))[1]
    big = run("big", order("group", size=int(SIZE * scale)))[1]
    calls = {way: order(way).calls for way in CALLS}
    print_costs(calls, ours, stock, threads)
    print_pending(many, pending)
    print_ticks(calls, many, ours, threads, pending)
    print_big(calls["group"], int(SIZE * scale), big)


def microseconds(value: float | None, stock: float) -> str:
    """A cost, and its ratio to stock Celery's."""
    return f"{value:8.0f} us {value / stock:6.2f}" if value is not None else " " * 18


def heading(first: str, *columns: str) -> str:
    """The line over a table: what its lines are, then columns of 18."""
    return f"{first:44}" + "".join(f"{column:>18}" for column in columns)


def print_costs(calls: dict[str, int], ours: Numbers, stock: Numbers, threads: Numbers) -> None:
    """Print what a call costs, one line for each way."""
    print(heading("client CPU per call, ratio to stock", "send only", "round trip", "in flight"))
    for name, way, numbers in (
        ("twistedcelery", "ours", ours),
        ("stock Celery, blocking", "stock", stock),
        ("  the same with publisher confirms", "stock", {"send": stock["send_confirmed"]}),
        ("thread pool, polled", "threads", threads),
    ):
        if numbers["send"] is not None:
            trip = numbers.get("round_trip")
            many = f"{calls[way]:18,}" if trip is not None else ""
            costs = microseconds(numbers["send"], stock["send"]) + microseconds(trip, stock["round_trip"])
            print(f"{name:44}{costs}{many}".rstrip())


def print_pending(many: int, pending: Numbers) -> None:
    """Print what pending results cost."""
    few, beside_few, beside_many = many // 100, pending["few"], pending["many"]
    print("\n" + heading("twistedcelery with results pending", f"{few:,}", f"{many:,}", "ratio"))
    print(
        f"{'round trip beside them':44}{beside_few:15.0f} us{beside_many:15.0f} us{beside_many / beside_few:18.2f}"
    )
    print(f"{'memory of each':44}{'':18}{pending['bytes']:12.0f} bytes")


def print_big(members: int, size: int, big: Numbers) -> None:
    """Print how late the ticks came beside big calls."""
    print_lateness(f"  a group of {members:,}", "group", big)
    print_lateness(f"  an argument of {size / 1e6:.0f} MB", "argument", big)
    print(f"{'    its longest call into C by itself':44}{big['longest_call'] * 1000:15.1f} ms")


def print_lateness(name: str, key: str, numbers: Numbers) -> None:
    """Print a line of the table of ticks."""
    values = [numbers[f"{key}_{what}"] for what in ("tick", "own", "alone", "collection")]
    print(f"{name:44}" + "".join(f"{value * 1000:15.1f} ms" for value in values))


def print_ticks(calls: dict[str, int], many: int, ours: Numbers, threads: Numbers, pending: Numbers) -> None:
    """Print how late the ticks came, and why."""
    print(
        "\n" + heading("worst lateness of a 10 ms tick", "all", "by own CPU", "no collections", "collection")
    )
    for name, key, numbers in (
        (f"thread pool, {calls['threads']:,} in flight", "flight", threads),
        (f"twistedcelery, {calls['ours']:,} in flight", "flight", ours),
        (f"  round trips with {many // 100:,} pending", "few", pending),
        (f"  round trips with {many:,} pending", "many", pending),
        (f"  calling {many:,}", "calling", pending),
        (f"  stopping with {many:,} pending", "stopping", pending),
    ):
        print_lateness(name, key, numbers)


def main() -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("servers", nargs="*", metavar="amqp|redis", help="which servers; both unless given")
    parser.add_argument("--quick", action="store_true", help="a tenth of the calls")
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the calls")
    parser.add_argument("--profile", action="store_true", help="print where a round trip's time goes instead")
    asked = parser.parse_args()
    if unknown := set(asked.servers) - {"amqp", "redis"}:
        parser.error(f"amqp or redis, not {', '.join(unknown)}")

    versions = ", ".join(
        f"{one} {importlib.metadata.version(one)}" for one in ("twistedcelery", "celery", "twisted")
    )
    print(
        f"{versions}, Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    began = time.monotonic()
    try:
        for name in asked.servers or ("amqp", "redis"):
            measure(name, 0.1 if asked.quick else asked.scale, profile=asked.profile)
            end_all()
    except ServerFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        end_all()
    print(f"\n{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
