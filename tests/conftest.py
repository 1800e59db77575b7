import sys
from pathlib import Path

# the files are scripts, not a package: what a test imports it takes from the repository's root and from here
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
