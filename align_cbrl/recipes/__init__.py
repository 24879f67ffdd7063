"""The recipes: configured jobs that `align-cbrl run` knows by name.

Their source is the folder `recipes` of the repository. A wheel carries it inside this package; in a checkout this
package looks for its modules there. A recipe's modules are therefore `align_cbrl.recipes...` everywhere, and another
package named `recipes` cannot take their place.
"""

from pathlib import Path

_INSIDE = Path(__file__).parent
if not (_INSIDE / "study.py").is_file():  # a checkout; in a wheel the recipes lie beside this file
    __path__ = [*__path__, str(_INSIDE.parents[1] / "recipes")]
