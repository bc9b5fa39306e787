"""A short lease of one GPU: the checks that matter most first, each part in a process with a limit of its own.

    python -m benchmarks.lease --out FOLDER

Every result is a line of FOLDER/results.jsonl, written to the disk at once, so that a lease that ends early keeps what
was found. What a part prints is in FOLDER/PART.log; caches of kernels and of their times are in FOLDER/cache.
"""
