"""Leaders that shape the rewards of language models, and how they are saved and loaded."""
