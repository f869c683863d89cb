"""OpenAI's HTTP API and a chat page for one model."""
