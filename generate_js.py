"""Make dataset.json from nnU-Net folders.

    python generate_js.py --data_path data                          # all images, for pre-training
    python generate_js.py --data_path data --labels --splits auto --output data/labelled.json   # for fine-tuning
    python generate_js.py --data_path data --organize_from my_scans --organize_to data/Dataset042_Mine

The same as `hyspark datalist`.
"""

from hyspark.cli import datalist, run

if __name__ == "__main__":
    run(datalist)
