"""What a rank is chosen by: how far rows are from what a model knows, and how many directions their gradients need."""
