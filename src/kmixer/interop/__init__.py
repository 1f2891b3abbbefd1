"""Other people's formats: Koneko's checkpoints, ONNX and torch export, Hugging Face."""
