"""The world of `tiny`: what its rows and its pretraining text are generated from, and how it is pretrained."""
