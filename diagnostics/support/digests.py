"""One digest for plain values, by which manifests and caches identify things."""

import hashlib
import json
from typing import Any


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a value as JSON, with sorted names; a value of any other type counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
