"""Worlds: a policy, its data, rewards and a judge; and the bench that trains and measures in any of them."""
