"""Benchmarks: ``pytest bench --benchmark-only`` times every operation beside its peers; ``python -m bench.report`` shows it."""
