"""Models: load, extend, export, and the attention they run on."""
