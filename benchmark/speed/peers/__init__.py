"""Adapters for `bench_worker.py`: each file defines `make(setup)`; those of public code import it from a checkout."""
