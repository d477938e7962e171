"""Data for mmcl: corpora to shards, shards to batches."""
