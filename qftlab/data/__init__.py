"""Rows, batches and the generators of the bundled data."""
