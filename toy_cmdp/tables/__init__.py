"""Contextual MDPs as tables, dense or sparse, and as linear systems.

Modules:
    cmdp: ContextualMDP, Tables, TabularLeader, TabularUtility
    transition: what is asked of a transition law, dense or sparse
    sparse: SparseTransition and its solvers
    line_transition: a state on a line that moves with noise
    linear_systems: LinearSystems, leaders given by them, utilities whose means are known
    arguments: checks of builders' arguments
"""
