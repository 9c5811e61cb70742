"""AMQP 0-9-1, from bytes to a broker and a result source.

Without I/O: `tables`, `methods` and `codec` (bytes and values), `events`, `login`, `confirms`, `connection` (the state
machine). With Twisted: `channel` and `protocol`, and what the rest of the package uses on top of them.
"""
