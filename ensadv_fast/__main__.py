"""python -m ensadv_fast"""
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
