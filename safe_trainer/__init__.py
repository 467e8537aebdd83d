"""Fine-tune an aligned chat model with TRL without fine-tuning its safety away.

What most users need is listed in `__init__.pyi` and loaded when it is first used, so `import safe_trainer` is cheap;
`safe_trainer.data`, `.evaluation` and `.methods.base` have what rows, judges and methods of your own need.

```python
from peft import LoraConfig
from safe_trainer import SafeSFTTrainer

trainer = SafeSFTTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    train_dataset=dataset,
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    safety="recommended",
)
trainer.train()
```
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
