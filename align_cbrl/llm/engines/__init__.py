"""Leaders for any other engine: a reward server that its trainer asks, and leader steps from its logs.

Modules:
    settings: the configuration of `align-cbrl serve` and of `align-cbrl step`
    requests: what an engine asks, read and checked
    journal: requests and the completions that wait for a leader step, on disk
    service: RewardService, which scores, learns and restarts where it was
    http: the same over HTTP
    client: functions for verl, OpenRLHF and trl that ask the server; needs nothing but Python
    logged: leader steps from a file of logs
"""
