"""Judges of completions and of pairs, with cache, budget and retries."""
