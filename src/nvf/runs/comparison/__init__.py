"""Many runs put together into one table and one figure."""
