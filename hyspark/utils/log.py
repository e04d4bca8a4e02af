"""The one logger of the package."""

import logging

LOG = logging.getLogger("hyspark")
