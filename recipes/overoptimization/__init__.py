"""The gold-KL frontier: what the judge says of a policy, against how far it has moved, under two rewards."""
