"""Make dataset.json from nnU-Net folders.

For pre-training, all images:

    python generate_js.py --data data

For fine-tuning, labelled cases, split into training and validation:

    python generate_js.py --data data --labels --splits auto --out data/labelled.json

From a folder of loose NIfTI files, first brought into nnU-Net layout:

    python generate_js.py --data data --organize_from my_scans --organize_to data/Dataset042_Mine

The same as `hyspark datalist`.
"""

from hyspark.cli.commands import datalist
from hyspark.cli.run_verb import run_verb

if __name__ == "__main__":
    run_verb(datalist)
