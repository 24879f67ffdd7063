"""What a run around a language model reads from YAML: one dataclass for each thing that can be built.

    leader     mixture, reward_model, shaped, length: tagged by `kind`
    objective  expected, kl_priced, preference, cvar, worst_group, mean_variance, constrained, set,
               targets, means: tagged by `kind`
    follower   rloo, grpo, tilted: tagged by `trainer`
    judge      a function, a reward model, a server, or a language model: told apart by the key that names it
    hpgd       the leader's steps
    response   next_step, best_response: how the policy of somebody else's engine responds; tagged by `kind`
    tracking   experiment trackers

Fields have the names and meanings of the arguments of the class that is built; `build` builds it.
"""
