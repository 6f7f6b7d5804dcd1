"""What every room stands on: deadlines, devices, RDMA parsing, reports. Imports no other room."""
