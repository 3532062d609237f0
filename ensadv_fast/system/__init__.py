"""The machine that a run is on, and nothing of models: files, signals, processes, ranks, streams."""
