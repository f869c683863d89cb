"""Making a draft for a target: prompts, a corpus of the target's own text, and an n-gram table of it."""
