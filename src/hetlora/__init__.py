"""HetLoRA: federated fine-tuning of language models with a LoRA rank for every device."""
