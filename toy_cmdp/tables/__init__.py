"""Contextual MDPs as tables, dense or sparse.

Modules:
    cmdp: ContextualMDP, Tables, TabularLeader, TabularUtility
    transition: what is asked of a transition law, dense or sparse
    sparse: SparseTransition and its solvers
    line_transition: a state on a line that moves with noise
    arguments: checks of builders' arguments
"""
