"""Which kinds of answers a policy gives: several good ones instead of one, or shares of kinds at their targets."""
