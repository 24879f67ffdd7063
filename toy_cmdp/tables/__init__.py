"""Contextual MDPs as tables, dense or sparse."""
