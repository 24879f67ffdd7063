"""Tune a reward on preferences alone: no judge, only pairs of a chosen and a rejected answer."""
