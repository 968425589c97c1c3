"""Benchmarks; docs/benchmarks.md lists the commands."""
