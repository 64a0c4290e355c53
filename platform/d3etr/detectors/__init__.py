"""Detection transformers: backbones, encoder, decoders, set criterion, weights."""
