"""The recipe `building`: air flow and insulation around somebody else's heating."""
