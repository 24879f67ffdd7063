"""Repair a hacked reward model: HPGD on its parameters, against iterated retraining on the same labels."""
