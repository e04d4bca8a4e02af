"""`python -m hyspark VERB`; under torchrun, `torchrun --nproc_per_node=4 -m hyspark VERB`."""

from hyspark.cli.main import main

if __name__ == "__main__":
    main()
