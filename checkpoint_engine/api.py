"""The HTTP service's names where programs written for the original import them."""

from checkpoint_engine.client import request_inference_to_update
from checkpoint_engine.service.app import make_app as _init_api

__all__ = ["_init_api", "request_inference_to_update"]
