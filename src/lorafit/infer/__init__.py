"""Use a model: evaluate it, talk to it."""
