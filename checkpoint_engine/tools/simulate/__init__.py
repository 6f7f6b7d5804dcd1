"""What an update will take, without a GPU: the real plan, on a cluster that is described.

``cluster`` has the machines and costs, ``update`` broadcasts and P2P joins, ``hosts`` updates whose
buckets are staged on each host, ``parallel`` what workers read, and ``engine`` the discrete events
behind all of them.
"""
