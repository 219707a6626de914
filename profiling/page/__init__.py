"""The profiling page: result files in, one HTML page out (see report.py)."""
