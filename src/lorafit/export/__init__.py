"""Ship a result: merged, or as an adapter that other tools read."""
