"""What goes over the network: a client of the OpenAI protocol, and who uses it: a teacher, a sampler."""
