"""One rank's ``ParameterServer`` over HTTP.

``serve`` listens, ``guard`` and ``access`` say who may ask for what, ``app`` has the routes that do
something and ``looking`` those that only look.
"""
