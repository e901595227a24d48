"""Keys that earlier versions wrote into `config.json` and `recipe.json`, and what they are called now.

Only saved files are translated. In a recipe an old key is an error that names the new one.
"""

from __future__ import annotations

from collections.abc import Mapping

# Config class -> {old key: new key}. Version 0.1 wrote the old keys.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "DataConfig": {"rows": "batch_size"},
    "MeshConfig": {"whole": "replicated"},
    "OptimConfig": {"accumulation": "grad_accum_steps"},
}
