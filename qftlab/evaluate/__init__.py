"""Evaluation: what was right, how sure that is, and the page that shows it."""
