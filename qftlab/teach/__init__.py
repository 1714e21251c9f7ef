"""What a notebook shows, and how it checks an exercise."""
