"""Tune a reward on preferences alone: no judge, only pairs of a chosen and a rejected answer.

Modules:
    data: the default pairs and how they are divided
"""
