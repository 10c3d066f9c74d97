"""The benchmark.

`python -m tests.bench` measures on a GPU; `python -m tests.bench.plots FILE.json` draws what was measured, without one.
"""
