"""Benchmarks of zgraph beside its baselines. They are not installed with the package: see README.md."""
