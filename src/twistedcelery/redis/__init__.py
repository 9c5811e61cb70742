"""Redis over Twisted.

``replies``       what error replies mean
``connection``    commands and replies, sans-IO; ``subscription``: channels and messages, sans-IO
``protocol``      the Twisted shells of both
``settings``      from Celery's and kombu's settings to connection configs
``opening``       one connection to one server; ``sentinel``, ``target``: the attempts that a keeper makes
``routing``       kombu's virtual exchanges, sans-IO: where a message goes, and what it looks like
``broker``        messages out; ``outcomes``: what may be sent again
``results``       states of tasks in; ``fetching``, ``asking``: reading many keys, and one
``reply_list``    ``rpc`` results over a Redis broker
``rooms``         from an app's settings to all of these
"""
