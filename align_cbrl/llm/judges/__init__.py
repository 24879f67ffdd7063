"""Judges of completions, of pairs and of sets of completions, with cache, budget and retries.

    judge     Judge: a scoring function, asked once for every completion
    pairwise  PairwiseJudge: a function that compares two completions of a prompt
    sets      SetJudge: a function that scores several completions of a prompt together
    kind      AnswerKind: which completions are answers of one kind
    remote    RemoteJudge: a scoring function that asks a server over HTTP
    chat      ChatJudge: a scoring function that asks a language model
    template  Template: its question
    reply     ReplyReader: the score in its reply
    usage     Usage and Prices: what it spends
    endpoint  Endpoint: a URL that both ask in JSON
    cache     JudgeCache: scores that were already paid for

A judge is what a leader wants: it scores the follower's completions and is never trained on.
"""

from align_cbrl.llm.judges.cache import JudgeCache
from align_cbrl.llm.judges.chat import ChatJudge
from align_cbrl.llm.judges.judge import Judge, judge_identity
from align_cbrl.llm.judges.kind import AnswerKind
from align_cbrl.llm.judges.pairwise import PairwiseJudge
from align_cbrl.llm.judges.remote import RemoteJudge
from align_cbrl.llm.judges.sets import SetJudge
from align_cbrl.llm.judges.usage import Prices, Usage
from align_cbrl.llm.scoring import ScoreFunction, call_score_function, check_scores

__all__ = [
    "Judge",
    "PairwiseJudge",
    "SetJudge",
    "AnswerKind",
    "RemoteJudge",
    "ChatJudge",
    "Usage",
    "Prices",
    "JudgeCache",
    "judge_identity",
    # of align_cbrl.llm.scoring; in 0.1.0 they were here
    "ScoreFunction",
    "call_score_function",
    "check_scores",
]
