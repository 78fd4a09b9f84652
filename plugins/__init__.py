"""Built-in passes."""
