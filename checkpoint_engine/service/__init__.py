"""One rank's ``ParameterServer`` over HTTP.

``serve`` listens, ``access`` says who may ask for what, ``app`` has the routes, ``jobs`` the calls
and ``metrics`` what Prometheus reads.
"""
