"""Weights in blocks of a few bits: how they are decoded, and modules that keep them so. Imports torch alone."""
