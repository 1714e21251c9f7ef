"""Numbers from tensors: losses, log-probabilities, sampling, rewards, pictures; nothing here knows a model."""
