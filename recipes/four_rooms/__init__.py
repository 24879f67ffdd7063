"""The recipe `four_rooms`: lead a follower through a cell by fines, on the published map."""
