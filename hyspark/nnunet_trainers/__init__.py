"""A trainer for nnU-Net, which searches this folder for it: `export nnUNet_extTrainer=FOLDER`."""

from pathlib import Path

FOLDER = str(Path(__file__).parent)
"""Path of this folder."""
