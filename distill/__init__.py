"""Making a draft for a target from text that the target writes itself: `python -m distill`, see README.md."""
