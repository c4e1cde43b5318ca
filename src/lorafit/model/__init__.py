"""What a model is (spec), and how it is read into memory (load)."""
