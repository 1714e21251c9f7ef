"""Text: tokenizers and chats."""
