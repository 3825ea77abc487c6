"""What a calibration costs: memory by the size of the model, time by the number of tokens."""
