"""The project of the two special tokens: its formats, prompts, data and checks, as commands of the course."""
