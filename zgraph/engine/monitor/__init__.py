"""What the engine tells of a training: throughput, FLOP, communication, and where it is written."""
