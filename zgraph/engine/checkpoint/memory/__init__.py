"""Copies of each rank's shards in the memory of its host and of the next, from which a lost host is restored."""
