"""Training of GANs and classifiers on Hugging Face accelerate, resumable bit for bit."""
