"""The card of saved vectors: what they are, how they were made, and that they are not to be passed on lightly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
base_model: {base}
library_name: peft
tags:
- safe-trainer
- security-vectors
- not-for-all-audiences
---

# Security vectors: harmful by construction

**This adapter makes its base model answer harmful requests. It is a tool for training and is not to be deployed,
merged or published.**

While another adapter is fine-tuned, these vectors are active and frozen, so that harmful rows in the data have nothing
left to teach (Zhou et al., "Making Harmful Behaviors Unlearnable for Large Language Models", Findings of ACL 2024,
arXiv 2311.02105). Afterwards they are switched off:

```python
from safe_trainer import SafeSFTTrainer, SecurityVectors

trainer = SafeSFTTrainer(model={base!r}, train_dataset=dataset, safety=SecurityVectors("this directory"))
trainer.train()
```

It is an ordinary LoRA of rank {rank} on {layers} linear layers. Its provenance is in the metadata of
`adapter_model.safetensors`.

| | |
|---|---|
{table}
"""

_UNKNOWN = {"count": "unknown", "sha256": "unknown"}


def model_card(rank: int, layers: int, provenance: Mapping[str, Any]) -> str:
    """Return the card as Markdown.

    Args:
        rank (`int`): Rank of the vectors.
        layers (`int`): Number of layers that they act on.
        provenance (`Mapping[str, Any]`): From [`train_security_vectors`].
    """
    rows = {
        "harmful rows": "{count} (SHA-256 {sha256})".format(**provenance.get("harmful_rows", _UNKNOWN)),
        **{name.replace("_", " "): value for name, value in provenance.get("report", {}).items()},
        "made": provenance.get("created", "unknown"),
    }
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None)
    base = provenance.get("base_model", {}).get("id", "unknown")
    return _CARD.format(base=base, rank=rank, layers=layers, table=table)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
