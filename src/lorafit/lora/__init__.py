"""The mathematics of low-rank adaptation, on any dense layer of any network."""
