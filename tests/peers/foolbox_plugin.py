"""Prepares Foolbox's own suite: its own tree is what is tested."""
import os
import sys

sys.path.insert(0, os.environ["ENSADV_PEER_PATH"])
