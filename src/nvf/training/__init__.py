"""Lightning: what is fitted, in which order, and how a fit survives a kill."""
