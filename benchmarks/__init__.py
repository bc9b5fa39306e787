"""Benchmarks of zgraph beside its peers. They are not installed with the package: see README.md."""
