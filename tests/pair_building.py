"""What builds the embedded pair and the study's second one, for tests: scripts under recipes/, outside the package."""

import sys
from pathlib import Path

_RECIPES = Path(__file__).resolve().parents[1] / "recipes"
for folder in (_RECIPES / "testbed" / "build", _RECIPES / "study"):
    sys.path.insert(0, str(folder))
try:
    import build_pair
    import corpus
    import second_world
    import translation
    from second_world import SECOND
    from world import EMBEDDED
finally:
    for folder in (_RECIPES / "testbed" / "build", _RECIPES / "study"):
        sys.path.remove(str(folder))

__all__ = ["EMBEDDED", "SECOND", "build_pair", "corpus", "second_world", "translation"]
