"""Training: one step, one loop, and what each stage adds."""
