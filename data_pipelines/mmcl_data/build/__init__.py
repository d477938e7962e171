"""From corpora on disk or made from nothing to WebDataset shards."""
