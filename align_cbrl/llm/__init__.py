"""Language models as followers, and the leaders and judges that shape them."""

from align_cbrl.llm.beta import LearnedBeta
from align_cbrl.llm.completions import Completions, sample_completions, score_arguments
from align_cbrl.llm.data import Preferences, load_preferences, load_prompts
from align_cbrl.llm.followers import LanguageFollower
from align_cbrl.llm.judge_cache import JudgeCache
from align_cbrl.llm.judges import Judge, PairwiseJudge
from align_cbrl.llm.leaders import LanguageLeader, load_leader, load_reward
from align_cbrl.llm.lora import LoRA
from align_cbrl.llm.population import Population
from align_cbrl.llm.remote_judge import RemoteJudge
from align_cbrl.llm.reward_mixture import RewardMixture
from align_cbrl.llm.reward_model_leader import RewardModelLeader
from align_cbrl.llm.reward_models import RewardModel
from align_cbrl.llm.schedule import Schedule
from align_cbrl.llm.shaping import LengthShaping, Shaped
from align_cbrl.llm.tilted import TiltedFollower
from align_cbrl.llm.trackers import Tracker
from align_cbrl.llm.trained import GRPOFollower, RLOOFollower, TrainedFollower
from align_cbrl.llm.training import train_follower

__all__ = [
    "LanguageLeader",
    "RewardMixture",
    "RewardModelLeader",
    "LoRA",
    "Shaped",
    "LengthShaping",
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
    "Population",
    "train_follower",
    "Judge",
    "PairwiseJudge",
    "RemoteJudge",
    "JudgeCache",
    "Completions",
    "sample_completions",
    "score_arguments",
    "load_prompts",
    "load_preferences",
    "Preferences",
    "Tracker",
]
