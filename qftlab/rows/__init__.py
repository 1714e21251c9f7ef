"""From files to examples and batches: what is read, refused, rendered, masked and counted."""
