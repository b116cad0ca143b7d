"""A run's outcome as something to look at; takes plain mappings, never a model."""
