"""The small networks of the tests of models."""

from tests.models.conftest import fixed_seed, make_encoder, make_hybird, make_hyspark, make_visible

__all__ = ["fixed_seed", "make_encoder", "make_hybird", "make_hyspark", "make_visible"]
