"""The networks: flow transformer, autoencoder, T5 and CLIP text encoders, LoRA."""
