"""A web server that answers with what a task returns, and stays quick whatever the tasks do.

    python twisted_web.py [ENDPOINT]     then open the URL that it prints

The task is `divide` of `demo_tasks.py`; start its worker with `celery -A demo_tasks worker`.
"""

from __future__ import annotations

import sys

from demo_tasks import app, divide
from kombu.exceptions import OperationalError
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import serverFromString
from twisted.internet.error import TimeoutError as TookTooLong
from twisted.internet.task import react
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from twistedcelery import TwistedCelery

#: Seconds that a visitor waits at most.
PATIENCE = 10


class Divide(Resource):
    """`GET /?x=1&y=2`: one number divided by another, by a worker."""

    isLeaf = True

    def __init__(self, tx, reactor):
        super().__init__()
        self.tx = tx
        self.reactor = reactor

    def render_GET(self, request):
        answering = Deferred.fromCoroutine(self.answer(request))
        # Where the visitor leaves, nobody needs the answer any more.
        request.notifyFinish().addErrback(lambda _: answering.cancel())
        return NOT_DONE_YET

    async def answer(self, request):
        try:
            code, text = 200, str(await self.divide(request))
        except CancelledError:
            return  # the visitor has left
        except (KeyError, ValueError):
            code, text = 400, "say ?x=1&y=2"
        except ZeroDivisionError as error:
            code, text = 422, str(error)  # the task's own exception
        except TookTooLong:
            code, text = 504, "the worker takes too long"
        except OperationalError as error:
            code, text = 503, f"the broker cannot be reached: {error}"
        request.setResponseCode(code)
        request.setHeader("content-type", "text/plain; charset=utf-8")
        request.write(f"{text}\n".encode())
        request.finish()

    def divide(self, request):
        numbers = [float(request.args[name][0]) for name in (b"x", b"y")]
        # Nobody waits for it after the timeout: then the workers need not run it either.
        call = self.tx.apply_async(divide, numbers, expires=PATIENCE, revoke_on_cancel=True)
        return call.addTimeout(PATIENCE, self.reactor)


async def main(reactor, endpoint="tcp:8080:interface=127.0.0.1"):
    tx = TwistedCelery(app)
    port = await serverFromString(reactor, endpoint).listen(Site(Divide(tx, reactor)))
    print(f"http://127.0.0.1:{port.getHost().port}/?x=1&y=2", flush=True)
    await Deferred()  # until Ctrl-C


if __name__ == "__main__":
    react(main, sys.argv[1:])
