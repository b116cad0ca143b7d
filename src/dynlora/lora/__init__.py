"""PEFT's LoRA layers seen as rank-one components, and changed in rank while they are in use."""
