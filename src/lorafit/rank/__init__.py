"""`lorafit rank`: the rank and the learning rate for one's own data, with evidence."""
