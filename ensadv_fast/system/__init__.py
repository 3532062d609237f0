"""The machine that a run is on, and nothing of models: files, signals, processes, ranks, streams.

Others import its modules, not names from them: `signals.asked` and `processes.bar_position` are set while a run goes on
and must be read through their modules.
"""
