"""Pure functions: losses, log-probabilities, sampling, rewards, plots. Imports nothing of ours."""
