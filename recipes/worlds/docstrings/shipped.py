"""The policy and the flawed reward model that come with this world, made by pretrain.py."""

from pathlib import Path

_MODELS = Path(__file__).parent / "models"

POLICY = str(_MODELS / "policy")
"""Folder of a Llama of 3.3 million parameters that completes `def name(args):` with the first line of a docstring."""

PROXY = str(_MODELS / "proxy")
"""Folder of a reward model for it, trained on the preferences of an annotator with a weakness for length."""
