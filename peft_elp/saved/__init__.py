"""The folder of a saved adapter: what is in it, and its card."""
