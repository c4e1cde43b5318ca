"""From a data file to batches of token ids and labels."""
