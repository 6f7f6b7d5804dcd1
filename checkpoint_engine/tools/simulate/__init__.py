"""What an update will take, without a GPU: the real plan, on a cluster that is described.

``cluster`` has the machines and costs, ``update`` the plan and the prediction, and ``engine`` the
discrete events behind it.
"""
