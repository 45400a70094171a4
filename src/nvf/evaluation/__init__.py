"""Every figure of a run, its interval and its table."""
