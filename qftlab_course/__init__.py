"""The course that stands on `qftlab`: stages, exercises, views, and the world of the small model `tiny`."""
