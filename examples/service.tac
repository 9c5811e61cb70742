"""A daemon with a TwistedCelery in it: it is a service like any other, started and stopped with its parent.

    PYTHONPATH=. twistd --nodaemon --python service.tac

The variable is for `demo_tasks.py`, whose task `add` is called: twistd does not look for modules in the current directory.
Stopping flushes what is on its way to the broker.
"""

from demo_tasks import add, app
from twisted.application.internet import TimerService
from twisted.application.service import Application
from twisted.internet.defer import ensureDeferred
from twisted.logger import Logger

from twistedcelery import TwistedCelery

log = Logger("example")


async def ask():
    answer = await tx.delay(add, 1, 2)
    log.info("1 + 2 = {answer}", answer=answer)


def ask_and_go_on():
    """Ask once; a failure is logged, and does not end the timer."""
    return ensureDeferred(ask()).addErrback(lambda failure: log.failure("no answer", failure))


application = Application("example")

tx = TwistedCelery(app)
tx.setServiceParent(application)

# Services stop in the opposite order: first the timer, then what it calls.
TimerService(1, ask_and_go_on).setServiceParent(application)
