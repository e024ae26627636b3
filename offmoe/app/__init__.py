"""The command line, the chat, and what they print."""
