"""The carrier scheme: watermarks of this project, built on MEA-Defender's mixes."""
