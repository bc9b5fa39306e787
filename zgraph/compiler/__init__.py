"""From a model and its options to one that runs: shards, captured graphs through the passes, and the report."""
