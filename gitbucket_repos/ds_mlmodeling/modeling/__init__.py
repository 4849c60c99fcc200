"""Train and evaluate the model whose code is in `image_classifier`."""
