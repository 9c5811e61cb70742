"""What a call costs; run it with ``python -m benchmarks``."""
