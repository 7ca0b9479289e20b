"""A base model with LoRA layers for many clients, and files in the format of PEFT."""
