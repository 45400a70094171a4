"""The retriever as plain torch; no Lightning and no Hydra."""
