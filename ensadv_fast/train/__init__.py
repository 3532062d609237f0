"""The training driver: from a `Config` to a run folder."""
from ..attacks.by_name import ATTACKS, make_attack
from .config import Config, load_config, open_folder
from .driver import run
from .job import Job, Run
from .logs import Log
from .loop import fit
from .meter import Meter
from .recipes import MAIN, PRESETS, Recipe
from .runs import RUNS, make_config

__all__ = ["ATTACKS", "Config", "Job", "Log", "MAIN", "Meter", "PRESETS", "RUNS", "Recipe", "Run", "fit",
           "load_config", "make_attack", "make_config", "open_folder", "run"]
