"""The hypergradient estimators of other papers, on one interface: what this library is measured against."""

from toy_cmdp.rivals.amd import AMD
from toy_cmdp.rivals.bchg import BCHG, SarsaCritic, TemporalDifferenceCritic
from toy_cmdp.rivals.value_penalty import ValuePenalty
from toy_cmdp.rivals.visit_averaged import VisitAveraged

__all__ = ["AMD", "BCHG", "SarsaCritic", "TemporalDifferenceCritic", "ValuePenalty", "VisitAveraged"]
