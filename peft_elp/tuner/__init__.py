"""How adapters get into a model and out of it."""
