"""Run a method inside Hugging Face's Trainer: plan, memory, distillation, LoRA, checkpoints and the trainer itself."""
