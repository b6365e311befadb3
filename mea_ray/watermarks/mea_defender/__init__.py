"""MEA-Defender for classifiers and encoders."""
