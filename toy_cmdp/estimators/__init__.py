"""Estimators that need tables or counts: the plug-in, published rivals, and climbs from many starts."""
