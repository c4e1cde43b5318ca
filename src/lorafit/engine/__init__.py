"""How a frozen model and its adapter are run: which precision, which positions reach the loss."""
