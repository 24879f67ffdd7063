"""One file for each problem, from the literature or as a test.

Modules:
    four_rooms: fines on a map
    tax_design: VAT and income tax for two households
    principal_agent: contracts on outcomes with hidden effort
    mechanism: posted prices over an inventory and a season
    meta_rl: a learned prior over tasks
    preferences: RLHF as a table
    free_rewards: a leader limited only by bounds on every reward
    stackelberg_game: commitment in a two-player Markov game
    discrete_toy: three states, and a leader whose draw the follower sees
    linear_feedback: a leader who acts in a regulator's system; LQR-v4
    building: air flow and insulation around somebody else's heating
    random_linear: random linear systems in which x moves everything at once
    gridworld: maps of any size, sparse
    random_cmdp: random problems in which x moves everything at once
    parallel: many leaders in one batch
    parallel_linear: the same for linear systems
"""
