"""The servers, the proxy and the test base do what they say: the other tests build on them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import amqp
import redis as redis_py
from celery import Celery
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.error import ConnectionRefusedError as ConnectionRefused
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.trial.unittest import SynchronousTestCase

from tests.support import processes, servers
from tests.support.case import IntegrationTestCase


def alive(pid):
    """Whether the process is there and not merely unreaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class Ending(SynchronousTestCase):
    """Nothing outlives the test process."""

    def child(self, program):
        """Start a Python process that starts things; returns it and the process ids that it printed."""
        child = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=servers.PROJECT
        )
        assert child.stdout is not None
        self.addCleanup(child.wait)
        self.addCleanup(child.stdout.close)
        return child, [int(word) for word in child.stdout.readline().split()]

    def assert_all_gone(self, pids):
        self.assertGreater(len(pids), 1)
        processes.wait_until(lambda: not any(map(alive, pids)), timeout=10, what=f"{pids} live on")

    program = """if True:
        import sys, time
        from tests.support import processes, servers
        one = servers.Redis(); one.start()
        # A daemon that has left its parent's session, as epmd does.
        leaver = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(600)"
        two = processes.Process([sys.executable, "-c", leaver + "\\n"], log=one.path / "x", env={}, cwd=one.path)
        three = processes.Process(["sh", "-c", "sleep 600 & sleep 600"], log=one.path / "y", env={}, cwd=one.path)
        time.sleep(0.3)
        all = [process._popen.pid for process in (one._process, three)]
        print(*all, *one._process.pids(), *three.pids(), flush=True)
        time.sleep(600)
    """

    def test_killed(self):
        """A test process that is killed with -9 leaves no server, no child of one and no directory."""
        before = set(Path(processes._root().parent).glob("twistedcelery-*"))
        child, pids = self.child(self.program)
        self.assertEqual(len(pids), 6)
        made = set(Path(processes._root().parent).glob("twistedcelery-*")) - before
        child.send_signal(signal.SIGKILL)
        self.assert_all_gone(pids)
        processes.wait_until(lambda: not any(path.exists() for path in made), timeout=10, what="files stay")

    def test_terminated(self):
        """So does one that is ended by SIGTERM."""
        child, pids = self.child(self.program)
        child.send_signal(signal.SIGTERM)
        self.assert_all_gone(pids)

    def test_daemons(self):
        """A daemon which has left its parent is killed with the command that started it."""
        where = processes.directory("daemon")
        daemon = "(setsid sleep 600 & echo $! > pid) & sleep 600"
        process = processes.Process(["sh", "-c", daemon], log=where / "log", env=dict(os.environ), cwd=where)
        processes.wait_until(lambda: (where / "pid").read_text().strip(), timeout=5, what="no daemon")
        pid = int((where / "pid").read_text())
        self.assertTrue(alive(pid))
        process.kill()
        self.assertFalse(alive(pid))

    def test_lost_supervisor(self):
        """A command whose supervisor is killed does not live on."""
        where = processes.directory("orphan")
        process = processes.Process(["sleep", "600"], log=where / "log", env=dict(os.environ), cwd=where)
        processes.wait_until(process.pids, timeout=5, what="no child")
        [pid] = process.pids()
        os.kill(process._popen.pid, signal.SIGKILL)
        processes.wait_until(lambda: not alive(pid), timeout=5, what="the command lives on")
        process.kill()

    def test_failing_start(self):
        """A server that cannot start is reported at once, with what it said."""
        server = servers.Redis(options={"no-such-option": "1"})
        began = time.monotonic()
        error = self.assertRaises(processes.ServerFailed, server.start)
        self.assertIn("no-such-option", str(error))
        self.assertLess(time.monotonic() - began, 5)

    def test_ports(self):
        """Ports differ, and lie outside the range that outgoing connections take theirs from."""
        ports = [processes.free_port() for _ in range(50)]
        self.assertLess(max(ports), 32768)
        fresh = processes.free_port()
        processes._used_ports.discard(fresh)
        choices = iter([ports[0], ports[1], fresh])
        self.patch(random, "randrange", lambda *_: next(choices))
        self.assertEqual(processes.free_port(), fresh)

    def test_temporary_names(self):
        """Trial's ``mktemp`` gives a new name each time, outside the working directory."""
        names = [Path(self.mktemp()).resolve() for _ in range(2)]
        self.assertNotEqual(*names)
        for name in names:
            self.assertTrue(name.parent.is_dir())
            self.assertFalse(name.exists())
            self.assertNotIn(Path.cwd(), name.parents)


class RealServers(SynchronousTestCase):
    """Each server can be logged into, killed and begun again with its data."""

    def test_rabbitmq(self):
        """RabbitMQ: TLS, users, virtual hosts, the memory alarm; killed, it comes back with its durable queues."""
        server = servers.RabbitMQ(tls=True)
        self.addCleanup(server.kill)
        server.start()
        url = server.add_vhost("a/b")
        self.assertTrue(url.endswith("/a%2Fb"))
        server.add_user("paula", "secret", vhosts=["a/b"])
        login = {"userid": "paula", "password": "secret", "virtual_host": "a/b"}
        ssl = {"ca_certs": str(processes.certificates().authority), "server_hostname": "localhost"}
        with amqp.Connection(f"127.0.0.1:{server.tls_port}", ssl=ssl, **login) as connection:
            connection.channel().queue_declare("kept", durable=True, auto_delete=False)
        server.set_memory_alarm(True)
        self.assertIn("memory", server.ctl("eval", "rabbit_alarm:get_alarms()."))
        server.set_memory_alarm(False)
        pids = server.process.pids()
        server.kill()
        self.assertFalse(any(map(alive, pids)))
        self.assertRaises(OSError, amqp.Connection(f"127.0.0.1:{server.port}").connect)
        server.restart()

        def is_kept():
            with amqp.Connection(f"127.0.0.1:{server.port}", **login) as connection:
                try:
                    return connection.channel().queue_declare("kept", passive=True).queue == "kept"
                except amqp.NotFound:
                    return False

        # The server serves as soon as its default virtual host is there; others may come later.
        processes.wait_until(is_kept, timeout=30, what="the queue has not come back")

    def test_redis(self):
        """Redis: password, ACL users, TLS, unix socket; killed, it comes back with what it was to keep."""
        server = servers.Redis(
            password="p@ss",
            tls=True,
            options={"user": ["ann on >pw ~* &* +@all"], "appendonly": "yes", "appendfsync": "always"},
        )
        self.addCleanup(server.kill)
        server.start()
        server.command("SET", "key", "value")
        self.assertRaises(redis_py.AuthenticationError, server.client(password="wrong").ping)
        with server.client(username="ann", password="pw") as client:
            self.assertEqual(client.get("key"), b"value")
        with redis_py.Redis(unix_socket_path=str(server.socket), password="p@ss") as client:
            self.assertEqual(client.get("key"), b"value")
        with redis_py.Redis.from_url(server.tls_url) as client:
            self.assertEqual(client.get("key"), b"value")
        server.kill()
        self.assertFalse(server.running)
        self.assertRaises(OSError, server.command, "PING")
        server.restart()
        self.assertEqual(server.command("GET", "key"), b"value")

    def test_pause(self):
        """A paused server keeps its connections and says nothing until it is resumed."""
        server = servers.Redis()
        self.addCleanup(server.kill)
        server.start()
        with server.client(socket_timeout=0.2) as client:
            client.ping()
            server.pause()
            self.assertRaises(redis_py.TimeoutError, client.ping)
            server.resume()
            self.assertTrue(client.ping())

    def test_sentinel(self):
        """The sentinels, with passwords, move the master on request and when it is killed."""
        group = servers.Sentinel(password="p", sentinel_password="s")
        self.addCleanup(group.stop)
        group.start()
        self.assertEqual(group.url.count("sentinel://:p@127.0.0.1:"), 3)
        first = group.master
        self.assertIs(first, group.nodes[0])
        group.failover()
        second = group.master
        self.assertIs(second, group.nodes[1])
        processes.wait_until(
            lambda: first.command("ROLE")[0] == b"slave", timeout=20, what="the old one stays master"
        )
        processes.wait_until(group._all_known, timeout=30, what="the old one does not follow")
        second.kill()
        group.wait_for_master_after(second)
        self.assertIs(group.master, first)

    def test_worker(self):
        """A worker of each pool takes tasks as soon as it has started, and ends in an orderly way."""
        broker = servers.database("a worker of each pool")
        with Celery(broker=broker, backend=broker, set_as_current=False) as app:
            for pool in ("threads", "solo", "prefork"):
                worker = servers.Worker(broker, broker, pool=pool, queues=["celery", pool])
                self.addCleanup(worker.kill)
                worker.start()
                result = app.send_task("tests.header_dump", (1,), queue=pool, priority=3).get(timeout=30)
                self.assertEqual(result["args"], [1])
                self.assertEqual(result["delivery_info"]["routing_key"], pool)
                self.assertEqual(result["hostname"], worker.hostname)
                worker.stop()
                self.assertEqual(worker.process.exit_code, 0, worker.log)

    def test_tasks(self):
        """The less usual tasks give what they say."""
        broker = servers.database("less usual tasks")
        servers.worker(broker, broker)
        path = processes.directory("record") / "lines"
        with Celery(broker=broker, backend=broker, set_as_current=False) as app:

            def call(name, *args):
                return app.send_task(f"tests.{name}", args)

            expected = {
                call("retry_then_succeed", 2): 2,
                call("progress", 3): 3,
                call("replace", 1, 2): 3,
                call("xsum", [1, [2, 3]]): 6,
                call("record", str(path), "here"): "here",
            }
            for result, value in expected.items():
                self.assertEqual(result.get(timeout=30), value)
            self.assertEqual(servers.wait_for_file(path, 1), ["here"])
            failed = call("custom_error", 7, "text")
            error = failed.get(timeout=30, propagate=False)
            self.assertEqual((type(error).__name__, error.args), ("CustomError", (7, "text")))
            for name in ("raise_unpicklable", "return_unserializable", "retry_for_ever"):
                self.assertIsInstance(call(name).get(timeout=30, propagate=False), Exception)

    def test_shared(self):
        """One server serves the whole run; two workers with different backends may not share a queue."""
        self.assertIs(servers.redis(), servers.redis())
        broker = servers.database("shared")
        self.assertEqual(servers.database("shared"), broker)
        self.assertNotEqual(servers.database("another"), broker)
        self.assertEqual(servers.vhost("shared"), servers.vhost("shared"))
        one = servers.worker(broker, broker)
        self.assertIs(servers.worker(broker, broker), one)
        self.assertRaises(ValueError, servers.worker, broker, "rpc://")


class Collector(Protocol):
    """Keeps what it receives."""

    transport: Any

    def __init__(self):
        self.received = bytearray()
        self.lost: Deferred[Exception] = Deferred()
        self.writes: list[int] = []

    def dataReceived(self, data):
        self.received += data
        self.writes.append(len(data))

    def connectionLost(self, reason=connectionDone):
        self.lost.callback(reason.value)


class Proxy(IntegrationTestCase):
    """Each fault of the proxy, between a client and a server of this process."""

    async def connect(self):
        """A server, a proxy in front of it, a client, and the server's end of that connection."""
        self.servers: list[Collector] = []

        def accepted():
            self.servers.append(Collector())
            return self.servers[-1]

        port = processes.free_port()
        listening = await TCP4ServerEndpoint(self.reactor, port, interface="127.0.0.1").listen(
            Factory.forProtocol(accepted)
        )
        self.addCleanup(listening.stopListening)
        self.tcp_proxy = await self.proxy(port)
        client = await self.client()
        await self.eventually(lambda: self.servers)
        return self.tcp_proxy, client, self.servers[0]

    def client(self):
        endpoint = TCP4ClientEndpoint(self.reactor, "127.0.0.1", self.tcp_proxy.port)
        return connectProtocol(endpoint, Collector())

    async def test_forwards(self):
        """Bytes go both ways, are counted, and are seen and changed by the hook."""
        proxy, client, server = await self.connect()
        seen = []

        def change(direction, data):
            seen.append(direction)
            return None if data == b"drop" else data.upper()

        proxy.on_data = change
        client.transport.write(b"to server")
        server.transport.write(b"to client!")
        await self.eventually(lambda: server.received and client.received)
        self.assertEqual((server.received, client.received), (b"TO SERVER", b"TO CLIENT!"))
        self.assertEqual((proxy.bytes_up, proxy.bytes_down, proxy.connections), (9, 10, 1))
        client.transport.write(b"drop")
        await self.eventually(lambda: len(seen) == 3)
        self.assertEqual(server.received, b"TO SERVER")

    async def test_end_is_passed_on(self):
        """All that one side wrote before it closed arrives, then the end of file."""
        proxy, client, server = await self.connect()
        server.transport.write(b"x" * 3_000_000)
        server.transport.loseConnection()
        await DeferredList([client.lost, server.lost])
        self.assertEqual(len(client.received), 3_000_000)
        await self.eventually(lambda: proxy.connections == 0)

    async def test_cut(self):
        """A cut resets both ends; new connections are taken."""
        proxy, client, server = await self.connect()
        proxy.cut()
        await DeferredList([client.lost, server.lost])
        await self.client()
        await self.eventually(lambda: len(self.servers) == 2)
        self.assertEqual(proxy.accepted, 2)

    async def test_stall(self):
        """A stalled direction fills until its sender has to wait, the other goes on; nothing is lost after it."""
        proxy, client, server = await self.connect()
        proxy.stall("up")
        client.transport.write(b"x" * 20_000_000)
        server.transport.write(b"still")
        await self.eventually(lambda: client.received == b"still")
        await self.sleep(0.1)
        self.assertEqual(server.received, b"")
        self.assertGreater(len(client.transport._tempDataBuffer) + len(client.transport.dataBuffer), 0)
        proxy.resume()
        await self.eventually(lambda: len(server.received) == 20_000_000)

    async def test_backpressure(self):
        """A reader that stops reading stops the writer through the proxy."""
        proxy, client, server = await self.connect()
        server.transport.pauseProducing()
        client.transport.write(b"x" * 50_000_000)
        await self.eventually(lambda: proxy.bytes_up > 0)
        await self.sleep(0.2)
        self.assertLess(proxy.bytes_up, 40_000_000)
        server.transport.resumeProducing()
        await self.eventually(lambda: len(server.received) == 50_000_000)

    async def test_refuse(self):
        """A refusing proxy keeps present connections; then it accepts on the same port again."""
        proxy, client, server = await self.connect()
        port = proxy.port
        await proxy.refuse()
        await self.failure_of(self.client(), ConnectionRefused)
        client.transport.write(b"still here")
        await self.eventually(lambda: server.received == b"still here")
        await proxy.accept()
        self.assertEqual(proxy.port, port)
        await self.client()

    async def test_server_down(self):
        """A client is dropped where the server behind the proxy cannot be reached."""
        proxy, _client, _server = await self.connect()
        proxy.target_port = processes.free_port()
        other = await self.client()
        await other.lost
        self.assertEqual(proxy.connections, 1)

    async def test_trickle(self):
        """Trickled bytes arrive in order, a few at a time."""
        proxy, client, server = await self.connect()
        proxy.trickle(3)
        data = bytes(range(100))
        client.transport.write(data)
        await self.eventually(lambda: server.received == data)
        self.assertGreater(len(server.writes), 10)
        proxy.resume()

    async def test_trickle_is_bounded(self):
        """What waits to be trickled does not pile up in the proxy; what waits at the end is still sent."""
        proxy, client, server = await self.connect()
        proxy.trickle(100)
        server.transport.write(b"x" * 20_000_000)
        await self.sleep(0.2)
        self.assertLess(max(end.queued for end in proxy._ends), 1_000_000)
        client.transport.abortConnection()
        await server.lost
        self.servers.clear()
        client = await self.client()
        await self.eventually(lambda: self.servers)
        self.servers[0].transport.write(b"x" * 30_000)
        self.servers[0].transport.loseConnection()
        await client.lost
        self.assertEqual(len(client.received), 30_000)

    async def test_stop(self):
        """Once the proxy has stopped, nothing of it is left."""
        proxy, client, server = await self.connect()
        await proxy.stop()
        self.assertEqual(proxy.connections, 0)
        await DeferredList([client.lost, server.lost])
        await self.failure_of(self.client(), ConnectionRefused)

    async def test_halve(self):
        """Half of the next chunk arrives, then the connection ends at both sides."""
        proxy, client, server = await self.connect()
        proxy.halve()
        server.transport.write(b"0123456789")
        await DeferredList([client.lost, server.lost])
        self.assertEqual(client.received, b"01234")
        client = await self.client()
        await self.eventually(lambda: len(self.servers) == 2)
        self.servers[1].transport.write(b"0123456789")
        await self.eventually(lambda: client.received == b"0123456789")

    async def test_cut_after_with_slow_reader(self):
        """Also where the reader has stopped for a while, exactly so many bytes arrive before the end."""
        _, client, server = await self.connect()
        client.transport.pauseProducing()
        self.tcp_proxy.cut_after(10_000_000)
        server.transport.write(b"x" * 20_000_000)
        await self.sleep(0.2)
        client.transport.resumeProducing()
        await client.lost
        self.assertEqual(len(client.received), 10_000_000)

    async def test_cut_after(self):
        """Exactly so many more bytes arrive, then the connection ends; the next one is whole."""
        proxy, client, server = await self.connect()
        proxy.cut_after(7, "up")
        client.transport.write(b"01234")
        await self.eventually(lambda: server.received == b"01234")
        client.transport.write(b"56789")
        await DeferredList([client.lost, server.lost])
        self.assertEqual(server.received, b"0123456")
        client = await self.client()
        client.transport.write(b"0123456789")
        await self.eventually(lambda: self.servers[-1].received == b"0123456789")

    async def test_garbage(self):
        """Injected bytes reach the client and no one else."""
        proxy, client, server = await self.connect()
        proxy.garbage(b"\xff\x00")
        await self.eventually(lambda: client.received == b"\xff\x00")
        self.assertEqual(server.received, b"")


class Base(IntegrationTestCase):
    """The helpers of the test base."""

    async def test_ticker(self):
        """The ticker measures how long the reactor was kept busy."""
        ticker = self.ticker()
        await self.sleep(0.1)
        self.assertGreater(ticker.ticks, 3)
        time.sleep(0.2)  # noqa: ASYNC251  # it is what the ticker is to notice
        await self.sleep(0.05)
        self.assertGreater(ticker.worst, 0.15)
        ticker.start()
        time.sleep(0.2)  # noqa: ASYNC251
        ticker.stop()
        self.assertGreater(ticker.worst, 0.15)

    async def test_eventually(self):
        """Waiting for what does not come fails the test."""
        error = await self.failure_of(self.eventually(lambda: False, timeout=0.05), self.failureException)
        self.assertIn("not within 0.05 s", str(error))

    async def test_in_thread(self):
        """Servers can be handled from threads while the reactor ticks on."""
        ticker = self.ticker()
        server = servers.Redis()
        self.addCleanup(server.kill)
        await self.in_thread(server.start)
        await self.in_thread(server.restart)
        await self.in_thread(server.kill)
        self.assertGreater(ticker.ticks, 3)
