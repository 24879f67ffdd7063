"""The referee: exact values, exact gradients, and optima known in closed form."""
