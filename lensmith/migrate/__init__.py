"""LLaMA-Factory's files as they are: its YAML and its dataset_info.json become a lensmith run, every key decided.

Reading order: `keys` (every key, as data), `given` (a file, its overrides, typed values), `convert` (the order of the
parts), then `entries` and `data`, `model`, `training`, `objective`, `parallel`; `write` and `page` show decisions.
"""
