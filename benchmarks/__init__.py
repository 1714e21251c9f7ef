"""Side-by-side measurements of qftlab against the libraries it competes with; `python benchmarks/run.py --help`."""
