"""The recipe `lqr`: a leader who acts in a regulator's system, from random starts."""
