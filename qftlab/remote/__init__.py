"""What is asked of others over the network: the client of every endpoint, and what stands on it."""
