"""How the method lives in PEFT: config, gated layers, tuner, and the way back to a plain LoRA."""
