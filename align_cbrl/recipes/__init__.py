"""The recipes: configured jobs that `align-cbrl run` knows by name.

Their source is the folder `recipes` of the repository. A wheel carries it inside this package; in a checkout this
package looks for its modules there. So a recipe's modules have one name everywhere, `align_cbrl.recipes...`, and no
other package named `recipes` can take their place.
"""

from pathlib import Path

_INSIDE = Path(__file__).parent
if not (_INSIDE / "loop.py").is_file():
    __path__ = [*__path__, str(_INSIDE.parents[1] / "recipes")]
