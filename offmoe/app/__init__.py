"""Command line, the chat, and what they print."""
