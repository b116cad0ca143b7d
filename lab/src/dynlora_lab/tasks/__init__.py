"""What a fine-tuning run is made of: weights, data, model head, metric, the run itself."""
