"""Scripts that measure the package; run as `python -m benchmarks.NAME` from the root."""
