"""The recipe `four_rooms`: lead a follower through a cell by fines, on the published map.

Modules:
    table: the published table, a search per cell and seed
    figures: fines on the map and the follower's occupancy
"""
