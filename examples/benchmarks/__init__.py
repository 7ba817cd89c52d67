"""What `benchmark.py` measures: one module per group of rows."""
