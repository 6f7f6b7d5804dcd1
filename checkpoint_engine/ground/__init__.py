"""What every room stands on: deadlines, devices, limits, RDMA, reports. Imports no other room."""
