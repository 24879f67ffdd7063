"""A run: its configuration, folder, checkpoints, metrics and report.

Modules:
    config: YAML and overrides to typed dataclasses
    config_help: what every key of a configuration means
    imports: objects and recipes by name or path
    outline: a recipe's configuration without its imports
    inputs: files and folders that a configuration names
    preflight: what is looked at before anything is trained
    progress: a bar on a terminal, a line now and then elsewhere
    run_folder: what a run's folder records about itself
    checkpoints: safetensors and JSON, complete or absent
    metrics: JSON lines, truncated on resume
    files: written whole and durably, or not at all
    lock: one process at a time in a folder
    secrets: kept out of what is written
    facts: what a run's numbers depend on
    interrupt: Ctrl-C and schedulers' signals between leader steps
    charts: curves as PNG and as SVG
    report: tables, charts and samples as one HTML file
    run_report: a report with what every run has to say of itself
    compare: several runs side by side
"""
