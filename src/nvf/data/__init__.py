"""From files or a generator to batches of queries."""
