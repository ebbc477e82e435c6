"""The Python tests over a module that was built otherwise: what `make sanitize` and `make test-emulated` run.

    python tests/beside.py FOLDER [pytest's arguments]

FOLDER holds the package with that module; the editable install, which would come first, is set aside.
"""

import sys

sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, sys.argv[1])

import pytest  # noqa: E402

import paged_kv  # noqa: E402

assert paged_kv.__file__.startswith(sys.argv[1]), paged_kv.__file__
sys.exit(pytest.main(sys.argv[2:]))
