"""Followers that are language models: trained by trl, tilted, or several at once.

Modules:
    base: LanguageFollower, the base class
    rloo: RLOOFollower, a policy that trl's RLOO trains
    grpo: GRPOFollower, the same by GRPO, where that has RLOO's fixed point
    trained: TrainedFollower, what the two have in common
    trl: the trainers, adapted from trl
    tilted: TiltedFollower, reweighted samples of the reference
    logged: LoggedFollower, completions of somebody else's logs
    population: Population, several followers as one
    schedule: Schedule, when the leader steps
    training: plain RLHF on a frozen reward, resumable
    callback: LeaderCallback, a leader in somebody's own trl script
    stepwise: StepwiseHPGD, leader steps in a loop that is somebody else's
    trainer_response: through what the leader's gradient goes there, by the trainer's settings
    trainer_batch: the trainer's batch as rollouts, and log-probabilities under policy and reference
    prompt_order: the prompts of an optimizer step, as a function of seed and step
    adapters: LoRA policies
"""
