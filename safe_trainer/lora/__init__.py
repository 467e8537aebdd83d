"""LoRA updates: as factors in a model, trained under a rule, and on disk."""
