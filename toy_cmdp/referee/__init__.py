"""The referee: exact values, exact gradients, and optima known in closed form.

Modules:
    exact: J, the implicit hypergradient, the exact critic, expectations of PolicyResponse
    linear_quadratic: the same in linear systems, by moments
    metric: the Fisher metric of the best response, for natural steps
    tabulated: objectives as tables
    frozen_policy: the same formulas at a policy that is not a best response
    closed_forms: optima known without gradient ascent
"""
