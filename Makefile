# Every target makes what it needs: a .venv of its own, and servers from Debian's packages where it may install them.
# `scripts/setup` tells how; PYTHON=python3.12 chooses the interpreter.

PY := .venv/bin/python
BROKER ?= redis

.PHONY: help test lint demo bench soak clean
.DEFAULT_GOAL := help

help:
	@echo "make test    lint, types and all tests, against real servers and workers"
	@echo "make lint    ruff and mypy only"
	@echo "make demo    a short story against a real worker, with an embedded server; BROKER=amqp: over RabbitMQ"
	@echo "make bench   what a call costs, beside stock Celery and a thread pool"
	@echo "make soak    long runs under load"
	@echo "make clean   remove what these targets made"

test: lint
	scripts/setup servers rabbitmq redis
	$(PY) -m pytest -n 2 --dist loadscope

lint:
	scripts/setup venv test lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo:
	scripts/setup venv demo
	$(if $(filter amqp,$(BROKER)),scripts/setup servers rabbitmq)
	$(PY) examples/demo.py $(BROKER)

bench:
	scripts/setup venv test
	scripts/setup servers rabbitmq redis
	$(PY) -m benchmarks

soak:
	scripts/setup venv test
	scripts/setup servers rabbitmq redis
	$(PY) -m pytest -m soak tests/soak

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage _trial_temp* dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
