"""Replies of a support desk: a small world for the laboratory, with a judge that a reward model misreads.

Modules:
    data: requests and replies
    policy: small policies of several families
    judge: a program
    proxy: the flawed reward model
    rewards: reward terms
"""
