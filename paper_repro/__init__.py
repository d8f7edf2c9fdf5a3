"""The papers' benchmarks, one folder each, and the command line that runs them: `python -m paper_repro`."""
