"""What users put in place of parts of Celery's, and how it shows in a message."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from kombu.messaging import Producer
from kombu.pools import ProducerPool
from kombu.utils.objects import cached_property

__all__ = [
    "CachedAMQP",
    "MethodAMQP",
    "OwnAMQP",
    "OwnPool",
    "OwnPoolAMQP",
    "OwnProducer",
    "PatientCelery",
    "wrap",
]


class OwnAMQP(AMQP):
    """An app's own class: it marks what it makes and what it sends."""

    def as_task_v1(self, *args, **kwargs):
        return self.marked(super().as_task_v1(*args, **kwargs))

    def as_task_v2(self, *args, **kwargs):
        return self.marked(super().as_task_v2(*args, **kwargs))

    def marked(self, message):
        message.headers["made"] = "own"
        return message

    def _create_task_sender(self):
        send = super()._create_task_sender()

        def own(producer, name, message, **options):
            return send(producer, name, message, headers={"sent": "own"}, **options)

        return own


class CachedAMQP(AMQP):
    """An app's own class, which overrides the attributes themselves."""

    @cached_property
    def send_task_message(self):
        send = self._create_task_sender()
        return lambda *args, **options: send(*args, headers={"sent": "own"}, **options)

    @cached_property
    def create_task_message(self):
        return lambda *args, **options: OwnAMQP.marked(self, self.as_task_v2(*args, **options))


class MethodAMQP(AMQP):
    """An app's own class, whose sender is a method. Stock Celery asks it once: then its own closure has taken the place."""

    def send_task_message(self, *args, **options):
        return super().send_task_message(*args, headers={"sent": "own"}, **options)


class OwnProducer(Producer):
    """An app's own class of producers."""

    def publish(self, body, *args, **options):
        return super().publish(
            body, *args, **{**options, "headers": {**options["headers"], "published": "own"}}
        )


class OwnPool(ProducerPool):
    """A pool of them."""

    Producer = OwnProducer


class OwnPoolAMQP(AMQP):
    """An app's own class, with a pool of its own producers."""

    _producer_pool: Any

    @property
    def producer_pool(self):
        if self._producer_pool is None:
            self._producer_pool = OwnPool(self.app.pool)
        return self._producer_pool


class PatientCelery(Celery):
    """An app's own class that looks at each call, and at each producer."""

    def send_task(self, name, *args, **options):
        return super().send_task(name, *args, **{**options, "shadow": "own"})

    @contextmanager
    def producer_or_acquire(self, producer=None):
        with super().producer_or_acquire(producer) as found:
            found.seen = True
            yield found


def wrap(app):
    """Put wrappers around what makes and sends messages."""
    amqp = app.amqp
    make, send = amqp.create_task_message, amqp.send_task_message
    amqp.create_task_message = lambda *args, **options: OwnAMQP.marked(amqp, make(*args, **options))

    def wrapper(producer, name, message, **options):
        message.headers["sent"] = "wrapped"
        return send(producer, name, message, **options)

    amqp.send_task_message = wrapper
