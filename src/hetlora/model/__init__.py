"""A base model with LoRA layers for many clients, and adapter files in the format of PEFT."""
