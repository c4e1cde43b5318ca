"""The demonstration: a small data set that ships with the package, and what `lorafit demo` does with it."""
