"""Reports on a training: throughput, FLOP, communication, and where they are written."""
