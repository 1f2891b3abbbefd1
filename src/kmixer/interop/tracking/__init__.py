"""Other people's trackers of experiments: mirrors of metrics.jsonl, which stays the record."""
