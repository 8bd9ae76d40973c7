"""The embedded default: a tiny model, real pictures and the run files that train on them. Nothing here is special:
the data become ordinary JSONL files and the run files go through the ordinary `train`."""
