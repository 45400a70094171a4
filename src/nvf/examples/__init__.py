"""Examples that run in a minute."""
