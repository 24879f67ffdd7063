"""Followers that are language models: trained by trl, tilted, or several at once."""
