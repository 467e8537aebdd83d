"""Fine-tune an aligned chat model with TRL without fine-tuning its safety away.

Everything public is named here and loaded when it is first used, so that `import safe_trainer` costs nothing:

```python
from safe_trainer import AsFT, SafeSFTTrainer

trainer = SafeSFTTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    train_dataset=dataset,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    safety=AsFT(unaligned_model="Qwen/Qwen2.5-0.5B", weight=1.0),
)
trainer.train()
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "GUARDS",
    "METHODS",
    "METRICS",
    "AlignmentDirection",
    "AsFT",
    "ClassifierJudge",
    "Comparison",
    "Drift",
    "DriftMonitor",
    "DriftPenalty",
    "Evaluation",
    "Fitting",
    "Floor",
    "FunctionJudge",
    "GuardJudge",
    "Landscape",
    "LikelihoodJudge",
    "Limits",
    "PhraseJudge",
    "PromptSet",
    "ReadOptions",
    "RefusalMonitor",
    "SaLoRA",
    "SafeSFTTrainer",
    "SafetyBasis",
    "SafetyMethod",
    "ScanResult",
    "SecurityVectors",
    "TrainedVectors",
    "compact_adapter",
    "compare",
    "conclude",
    "conversation",
    "encode_row",
    "evaluate",
    "from_json",
    "gate",
    "general_prompts",
    "generate",
    "leaked_rows",
    "load_prompts",
    "load_rows",
    "measure_drift",
    "measure_landscape",
    "perplexity",
    "poison",
    "read_records",
    "recipe",
    "recommended",
    "rouge",
    "scan_file",
    "score_rows",
    "scored",
    "stream_rows",
    "testbed",
    "to_html",
    "to_markdown",
    "token_f1",
    "train_security_vectors",
    "write_model_card",
    "write_drift",
    "write_landscape",
    "write_report",
]

if TYPE_CHECKING:  # what type checkers and editors read; at run time `_HOMES` below says the same
    from safe_trainer import recipe, testbed
    from safe_trainer.analysis.drift import Drift, DriftMonitor, measure_drift, write_drift
    from safe_trainer.analysis.landscape import Landscape, measure_landscape, write_landscape
    from safe_trainer.analysis.scan import ScanResult, scan_file, score_rows
    from safe_trainer.artifacts.alignment_direction import AlignmentDirection
    from safe_trainer.artifacts.safety_basis import SafetyBasis
    from safe_trainer.artifacts.security_vectors import Fitting, TrainedVectors, train_security_vectors
    from safe_trainer.data import (
        PromptSet,
        ReadOptions,
        conversation,
        encode_row,
        leaked_rows,
        load_prompts,
        load_rows,
        poison,
        read_records,
        stream_rows,
    )
    from safe_trainer.evaluation import (
        GUARDS,
        METRICS,
        ClassifierJudge,
        Comparison,
        Evaluation,
        Floor,
        FunctionJudge,
        GuardJudge,
        LikelihoodJudge,
        Limits,
        PhraseJudge,
        RefusalMonitor,
        compare,
        conclude,
        evaluate,
        from_json,
        gate,
        general_prompts,
        generate,
        perplexity,
        rouge,
        scored,
        to_html,
        to_markdown,
        token_f1,
        write_report,
    )
    from safe_trainer.lora.reparametrize import compact_adapter
    from safe_trainer.methods import METHODS, AsFT, DriftPenalty, SafetyMethod, SaLoRA, SecurityVectors
    from safe_trainer.methods.recommended import recommended
    from safe_trainer.recipe.model_card import write_model_card
    from safe_trainer.trainer import SafeSFTTrainer

_HOMES = {
    "GUARDS": "evaluation",
    "METHODS": "methods",
    "METRICS": "evaluation",
    "AlignmentDirection": "artifacts.alignment_direction",
    "AsFT": "methods",
    "ClassifierJudge": "evaluation",
    "Comparison": "evaluation",
    "Drift": "analysis.drift",
    "DriftMonitor": "analysis.drift",
    "DriftPenalty": "methods",
    "Evaluation": "evaluation",
    "Fitting": "artifacts.security_vectors",
    "Floor": "evaluation",
    "FunctionJudge": "evaluation",
    "GuardJudge": "evaluation",
    "Landscape": "analysis.landscape",
    "LikelihoodJudge": "evaluation",
    "Limits": "evaluation",
    "PhraseJudge": "evaluation",
    "PromptSet": "data",
    "ReadOptions": "data",
    "RefusalMonitor": "evaluation",
    "SaLoRA": "methods",
    "SafeSFTTrainer": "trainer",
    "SafetyBasis": "artifacts.safety_basis",
    "SafetyMethod": "methods",
    "ScanResult": "analysis.scan",
    "SecurityVectors": "methods",
    "TrainedVectors": "artifacts.security_vectors",
    "compact_adapter": "lora.reparametrize",
    "compare": "evaluation",
    "conclude": "evaluation",
    "conversation": "data",
    "encode_row": "data",
    "evaluate": "evaluation",
    "from_json": "evaluation",
    "gate": "evaluation",
    "general_prompts": "evaluation",
    "generate": "evaluation",
    "leaked_rows": "data",
    "load_prompts": "data",
    "load_rows": "data",
    "measure_drift": "analysis.drift",
    "measure_landscape": "analysis.landscape",
    "perplexity": "evaluation",
    "poison": "data",
    "read_records": "data",
    "recipe": "recipe",  # the module itself
    "recommended": "methods.recommended",
    "rouge": "evaluation",
    "scan_file": "analysis.scan",
    "score_rows": "analysis.scan",
    "scored": "evaluation",
    "stream_rows": "data",
    "testbed": "testbed",  # the module itself
    "to_html": "evaluation",
    "to_markdown": "evaluation",
    "token_f1": "evaluation",
    "train_security_vectors": "artifacts.security_vectors",
    "write_model_card": "recipe.model_card",
    "write_drift": "analysis.drift",
    "write_landscape": "analysis.landscape",
    "write_report": "evaluation",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that it lives in (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module `safe_trainer` has no attribute `{name}`")
    home = import_module(f"safe_trainer.{_HOMES[name]}")
    value = home if name == _HOMES[name] else getattr(home, name)
    globals()[name] = value  # so that the next use does not come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
