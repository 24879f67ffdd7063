"""The recipe `principal_agent`: the best contract under limited liability, against closed form and grid search."""
