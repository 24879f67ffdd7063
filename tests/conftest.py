"""No test may reach a hub: a name that is not a folder has to fail at once."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, hence here
