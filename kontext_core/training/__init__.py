"""Training: one loop for every stage (autoencoder, flow, LoRA, distillation), restartable bit for bit."""
