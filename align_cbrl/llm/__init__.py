"""Language models as followers, and the leaders and judges that shape them.

Modules:
    leaders: rewards that a leader learns
    followers: policies trained by trl, reweighted samples, populations
    judges: scores by function, reward model, server, language model or comparison
    settings: all of these from YAML
    engines: a reward server for any other engine, and leader steps from its logs
    scoring: the signature of scoring functions, and the check of what they return
    reward_models: RewardModel, sequence classifiers as reward functions
    loading: what is said of a model that does not load, and of one before it is loaded
    prompts: the door at which every row of prompts is looked at, and the names of columns that are taken
    conversations: what is said in texts and in lists of messages
    sampling: completions of a causal language model as Rollouts
    logs: completions that somebody else sampled, as rollouts
    data: prompts and preferences from files, folders, functions or the hub
    trackers: TensorBoard, Weights & Biases and others
"""

from align_cbrl.llm.data import Preferences, load_preferences, load_prompts
from align_cbrl.llm.followers.base import LanguageFollower
from align_cbrl.llm.followers.callback import LeaderCallback
from align_cbrl.llm.followers.grpo import GRPOFollower
from align_cbrl.llm.followers.logged import LoggedFollower
from align_cbrl.llm.followers.population import Population
from align_cbrl.llm.followers.rloo import RLOOFollower
from align_cbrl.llm.followers.schedule import Schedule
from align_cbrl.llm.followers.tilted import TiltedFollower
from align_cbrl.llm.followers.trained import TrainedFollower
from align_cbrl.llm.followers.training import train_follower
from align_cbrl.llm.judges.cache import JudgeCache
from align_cbrl.llm.judges.chat import ChatJudge
from align_cbrl.llm.judges.judge import Judge
from align_cbrl.llm.judges.kind import AnswerKind
from align_cbrl.llm.judges.pairwise import PairwiseJudge
from align_cbrl.llm.judges.remote import RemoteJudge
from align_cbrl.llm.judges.sets import SetJudge
from align_cbrl.llm.judges.usage import Prices, Usage
from align_cbrl.llm.leaders import (
    Correction,
    LanguageLeader,
    LearnedBeta,
    LengthShaping,
    LoRA,
    RewardMixture,
    RewardModelLeader,
    Shaped,
    load_leader,
    load_reward,
)
from align_cbrl.llm.logs import load_rollouts
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.llm.sampling import Completions, sample_completions
from align_cbrl.llm.scoring import score_arguments
from align_cbrl.llm.trackers import Tracker

__all__ = [
    "LanguageLeader",
    "RewardMixture",
    "RewardModelLeader",
    "LoRA",
    "Shaped",
    "LengthShaping",
    "Correction",
    "LearnedBeta",
    "RewardModel",
    "load_leader",
    "load_reward",
    "LanguageFollower",
    "TrainedFollower",
    "RLOOFollower",
    "GRPOFollower",
    "Schedule",
    "TiltedFollower",
    "LoggedFollower",
    "Population",
    "train_follower",
    "LeaderCallback",
    "Judge",
    "PairwiseJudge",
    "SetJudge",
    "AnswerKind",
    "RemoteJudge",
    "ChatJudge",
    "Usage",
    "Prices",
    "JudgeCache",
    "Completions",
    "sample_completions",
    "score_arguments",
    "load_prompts",
    "load_preferences",
    "load_rollouts",
    "Preferences",
    "Tracker",
]
