"""What a process started for another revision runs before anything else, found by its name on PYTHONPATH.

An editable installation of dsv3 leaves a finder behind that offers the working tree's module wherever a package of the
revision lacks one, so that a training of today would run on layers of last year. Here it goes.
"""

import sys

sys.meta_path[:] = [
    finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable___dsv3")
]
