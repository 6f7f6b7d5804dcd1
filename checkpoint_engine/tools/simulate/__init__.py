"""What an update will take, without a GPU: the real plan, on a cluster that is described.

``checkpoint`` has the plan, ``cluster`` the machines and costs, ``update`` the prediction, and
``engine`` the discrete events behind it.
"""
