"""Leaders that shape the rewards of language models.

| to be read for | module |
|---|---|
| the contract, saving and loading | `base`: `LanguageLeader`, `load_leader`, `load_reward` |
| a weighted sum of reward functions | `mixture`: `RewardMixture` |
| a reward model, its head, an adapter or all of it | `reward_model`: `RewardModelLeader`; `lora`: `LoRA` |
| a frozen reward plus a small learned correction | `shaped`: `Shaped`; `correction`: `Correction` |
| a frozen reward less a charge for length | `length`: `LengthShaping` |
| what those two have in common | `frozen`: `FrozenPlus` |
| the temperature as a parameter | `beta`: `LearnedBeta` |
| standardising a reward within prompts | `calibration` |
| the folder of a saved leader | `saved`, `model_card`, `terms` (reward functions in it), `import_names` |
| what of such a folder may run | `trust` |

Modules:
    base: LanguageLeader, the base class
    saved: saving, loading and the registry of classes
    mixture: RewardMixture, the weights of several rewards
    reward_model: RewardModelLeader, a head, an adapter or all parameters
    shaped: Shaped, a frozen reward with a learned correction
    length: LengthShaping, a learned length penalty
    beta: LearnedBeta, the temperature as a parameter
    calibration: standardisation of rewards within prompts
    lora: adapters in reward models
    terms: reward functions and reward models stored with a leader
    trust: what loading a saved leader may run
    model_card: the README of a saved leader
    correction: Correction, what `shaped` adds to a frozen reward
    frozen: FrozenPlus, a frozen reward plus something small
    import_names: classes by importable names, for saved folders
"""

from align_cbrl.llm.leaders.base import LanguageLeader, load_leader, load_reward
from align_cbrl.llm.leaders.beta import LearnedBeta
from align_cbrl.llm.leaders.correction import Correction
from align_cbrl.llm.leaders.length import LengthShaping
from align_cbrl.llm.leaders.lora import LoRA
from align_cbrl.llm.leaders.mixture import RewardMixture
from align_cbrl.llm.leaders.reward_model import RewardModelLeader
from align_cbrl.llm.leaders.shaped import Shaped

__all__ = [
    "Correction",
    "LanguageLeader",
    "LearnedBeta",
    "LengthShaping",
    "LoRA",
    "RewardMixture",
    "RewardModelLeader",
    "Shaped",
    "load_leader",
    "load_reward",
]
